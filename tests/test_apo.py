"""APO: the path of its extrapolated rounds to the card's digits, and runs of the tiny model."""

import math
from itertools import pairwise

import pytest
import torch

from language_runs import SMALL, assert_resumes, final_weights, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.games.apo import APO
from postgrad.models.language import LoraSettings, load_policy
from postgrad.models.snapshots import Snapshot, soup
from postgrad.objectives.iterative import extrapolated_logits, mirror_step
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}="} for i in range(24)]
SHORT = {"rollout": {"samples": 3, "max_new_tokens": 5}, "batch_size": 8, "minibatches": 2}


def letters(completions):
    return [10.0 * sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


# Exact rounds --------------------------------------------------------------------------------

REWARD = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()


def exact_rounds(alpha, rounds, beta=0.5):
    """Solutions and the centres that follow them, every round solved exactly."""
    solution = centre = REFERENCE
    path = []
    for _ in range(rounds):
        before, solution = solution, mirror_step(centre, REWARD, beta)
        centre = extrapolated_logits(solution, before, alpha).log_softmax(0)
        path.append((solution.exp(), centre.exp()))
    return path


def test_the_worked_rounds():
    expected = [
        ((0.529056, 0.291944, 0.179000), (0.627163, 0.256383, 0.116454)),
        ((0.850689, 0.127934, 0.021377), (0.898197, 0.091456, 0.010347)),
        ((0.962448, 0.036051, 0.001500), (0.975265, 0.024075, 0.000660)),
    ]
    for found, wanted in zip(exact_rounds(0.3, 3), expected, strict=True):
        for policy, numbers in zip(found, wanted, strict=True):
            assert policy.tolist() == pytest.approx(numbers, abs=1e-6)
    plain = [(0.529056, 0.291944, 0.179000), (0.800774, 0.162559, 0.036667),
             (0.925174, 0.069093, 0.005733)]  # fmt: skip
    for (solution, centre), numbers in zip(exact_rounds(0.0, 3), plain, strict=True):
        assert solution.tolist() == pytest.approx(numbers, abs=1e-6)
        assert solution.equal(centre)


def test_rounds_go_one_over_one_minus_alpha_as_far():
    """How many times exp(r/beta) a policy is tilted: its log-odds say."""
    path = exact_rounds(0.3, 6)

    def tilt(policy):
        change = policy.log() - REFERENCE
        return float(change[0] - change[2]) * 0.5 / 1.0

    solutions = [tilt(solution) for solution, _ in path]
    centres = [tilt(centre) for _, centre in path]
    assert solutions == pytest.approx([1, 2.3, 3.69, 5.107, 6.5321, 7.95963], abs=1e-5)
    assert centres == pytest.approx([1.3, 2.69, 4.107, 5.5321, 6.95963, 8.387889], abs=1e-5)
    far = exact_rounds(0.3, 15, beta=5.0)
    steps = [10 * (tilt(after[0]) - tilt(before[0])) for before, after in pairwise(far)]
    assert steps[-1] == pytest.approx(1 / 0.7, abs=1e-4)


def test_weights_of_a_log_linear_policy_and_its_logits_extrapolate_alike():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(7, 4, generator=random)
    now, before = torch.randn(2, 4, generator=random)
    by_weights = features @ soup([{"w": now}, {"w": before}], [1.4, -0.4])["w"]
    by_logits = extrapolated_logits(features @ now, features @ before, 0.4)
    torch.testing.assert_close(by_weights.log_softmax(0), by_logits.log_softmax(0))
    shifted = extrapolated_logits(features @ now + 3.0, features @ before - 5.0, 0.4)
    torch.testing.assert_close(shifted.softmax(0), by_logits.softmax(0))
    same = {"w": now}
    torch.testing.assert_close(soup([same, same], [1.4, -0.4])["w"], now)
    for alpha in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\)"):
            extrapolated_logits(now, before, alpha)


# The method ----------------------------------------------------------------------------------


def made(**config):
    values = {"model": "tiny", **SHORT, **config}
    return APO(validated(APO.Config, values), Place(), data=ROWS, reward=letters)


def weights(method):
    return Snapshot(method.policy).weights


def optimisers(method):
    loop = LoopSettings(learning_rate=1e-3, clip_norm=0, token_budget=None)
    return Optimisers(method.modules(), loop, torch.device("cpu"))


def test_a_round_begins_beyond_the_last_solution_and_is_centred_there():
    method = made(alpha=0.5)
    optimise = optimisers(method)
    start = weights(method)
    first = method.collect(0)
    assert all(torch.equal(start[n], w) for n, w in weights(method).items())  # a plain first round
    method.update(first, optimise)
    solution = weights(method)
    assert any(not torch.equal(solution[n], start[n]) for n in start)
    second = method.collect(1)
    beyond = soup([solution, start], [1.5, -0.5])
    assert all(torch.equal(beyond[n], w) for n, w in weights(method).items())
    with torch.no_grad():
        torch.testing.assert_close(
            method.compared(second).logprobs, second.centre, atol=1e-4, rtol=1e-4
        )
        assert float(method.loss(second)[0]) == pytest.approx(math.log(2), abs=1e-4)
    method.collect(1)  # again, as after a failure: the policy stays where it is
    assert all(torch.equal(beyond[n], w) for n, w in weights(method).items())
    method.update(second, optimise)
    third = weights(method)
    method.collect(2)
    anchored = soup([third, solution], [1.5, -0.5])  # at the solution, not at the centre
    assert all(torch.equal(anchored[n], w) for n, w in weights(method).items())


def test_every_round_has_an_optimiser_of_its_own():
    """Nothing of the first round is left: the second is as with a new optimiser."""
    method, other = made(), made()
    used = optimisers(method)
    method.update(method.collect(0), used)
    assert not used.state_dict()["policy"]["state"]
    other.update(other.collect(0), optimisers(other))
    method.update(method.collect(1), used)
    other.update(other.collect(1), optimisers(other))
    for name, weight in weights(other).items():
        assert torch.equal(weights(method)[name], weight)


@pytest.mark.parametrize("base", ["dpo", "ipo", "sppo"])
def test_the_base_losses(base):
    method = made(base=base, beta=0.4)
    batch = method.collect(0)
    with torch.no_grad():
        for parameter in method.policy.parameters():
            parameter.mul_(1.02)
        ratio = method.compared(batch).logprobs - batch.centre
        loss, _ = method.loss(batch)
    delta = ratio[:, 0] - ratio[:, 1]
    expected = {
        "dpo": -torch.nn.functional.logsigmoid(0.4 * delta),
        "ipo": (delta - 1 / 0.8).square(),
        "sppo": (ratio - (batch.scores - 0.5) / 0.4).square().mean(1),
    }[base]
    assert float(loss) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_without_extrapolation_rounds_follow_each_other(tmp_path):
    """alpha = 0 is the iterative base method: a round starts where the last one ended."""
    method = made(alpha=0.0)
    optimise = optimisers(method)
    method.update(method.collect(0), optimise)
    solution = weights(method)
    method.collect(1)
    assert all(torch.equal(solution[n], w) for n, w in weights(method).items())


def test_it_learns_to_say_letters_and_ends_at_a_solution(tmp_path):
    run = train(
        "apo",
        data=ROWS,
        reward=letters,
        output=tmp_path / "run",
        steps=6,
        **{**SMALL, **SHORT, "minibatches": 4, "batch_size": 16},
        eval_data=write_rows(tmp_path / "held.jsonl", ROWS[:12]),
        frontier={"max_new_tokens": 5, "samples": 4},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wins = [row["evaluation/win_rate"] for row in rows if "evaluation/win_rate" in row]
    assert wins[-1] > 0.6
    saved, last = final_weights(tmp_path / "run"), weights(run.method)
    assert all(torch.equal(saved[name.removeprefix("network.")], w) for name, w in last.items())


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "kinds.py").write_text(
        "def score(completions):\n    return [9.0 * len(set(text)) for text in completions]\n"
    )
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{tmp_path}/kinds.py:score",
        "alpha": 0.5,
        "save_every": 1,
    }
    assert_resumes("apo", tmp_path, **settings)


def test_adapters_are_refused():
    with pytest.raises(PostgradError, match=r"tune: apo extrapolates weights.*expected full"):
        made(tune="lora")
    adapted = load_policy("tiny", tune="lora", lora=LoraSettings(rank=2, alpha=4))
    config = validated(APO.Config, {"model": "tiny", **SHORT})
    with pytest.raises(PostgradError, match="tune: apo extrapolates weights") as caught:
        APO(config, Place(), model=adapted, data=ROWS, reward=letters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": 1.0}, "alpha: .*less than 1"),
        ({"alpha": -0.1}, "alpha: .*greater than or equal to 0"),
        ({"base": "kto"}, "base: .*dpo"),
        ({"beta": 0}, "beta: .*greater than 0"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    with pytest.raises(PostgradError, match=message):
        made(**setting)
