"""Nash-MD: exact steps in tables, the weights of its policy gradient, and real runs."""

import inspect
import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.games.nash_md import NashMD, NashMDSettings
from postgrad.objectives.game import (
    divergence,
    geometric_mixture,
    mirror_step,
    nash_md_step,
    nash_policy,
    nash_weights,
    random_game,
    wins_against,
)
from postgrad.objectives.policy_gradient import reinforce
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
MU = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PI = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]


def prefer(first, second):
    def letters(text):
        return sum(c.isalpha() for c in text) / max(len(text), 1)

    pairs = [(letters(a), letters(b)) for a, b in zip(first, second, strict=True)]
    return [0.9 if one > other else 0.1 if one < other else 0.5 for one, other in pairs]


def made(**config):
    values = {
        "model": "tiny",
        "batch_size": 4,
        "rollout": {"samples": 2, "max_new_tokens": 5},
        **config,
    }
    return NashMD(
        validated(NashMDSettings, values), Place(), data=ROWS, eval_data=ROWS, preference=prefer
    )


# Tables -----------------------------------------------------------------------------------------


def test_the_worked_example():
    tau, eta = 0.5, 0.4
    mixture = geometric_mixture(PI.log(), MU.log(), eta * tau).softmax(-1)
    expected = {
        (0.248090, 0.466221, 0.285689): mixture,
        (0.600781, 0.486471, 0.434561): wins_against(P, mixture),
        (0.258216, 0.463562, 0.278223): nash_md_step(P, PI.log(), MU.log(), tau, eta).exp(),
    }
    for numbers, found in expected.items():
        torch.testing.assert_close(found, torch.tensor(numbers).double(), atol=1e-6, rtol=0)


def test_with_decreasing_steps_the_last_policy_is_the_equilibrium():
    tau = 0.5
    target = nash_policy(P, MU, tau)
    log_policy = MU.log()
    for t in range(2000):
        log_policy = nash_md_step(P, log_policy, MU.log(), tau, 2 / (tau * (t + 2)))
        distance = float(divergence(target, log_policy.exp()))
        assert distance <= 8 / (tau**2 * (t + 2))
    expected = torch.tensor([0.527162, 0.230644, 0.242194]).double()
    torch.testing.assert_close(log_policy.exp(), expected, atol=1e-6, rtol=0)
    assert distance == pytest.approx(4.185e-9, rel=1e-3)


def test_a_step_is_the_best_compromise_of_winning_and_staying():
    tau, eta = 0.3, 0.5
    random = torch.Generator().manual_seed(0)
    mixture = geometric_mixture(PI.log(), MU.log(), eta * tau).softmax(-1)

    def worth(policy):
        return float(eta * policy @ P @ mixture - divergence(policy, mixture))

    best = worth(nash_md_step(P, PI.log(), MU.log(), tau, eta).exp())
    for _ in range(50):
        other = torch.randn(3, generator=random, dtype=torch.float64).softmax(-1)
        assert worth(other) <= best + 1e-12


def test_a_constant_step_ends_beside_the_equilibrium():
    tau, target = 0.5, nash_policy(P, MU, 0.5)
    distances = []
    for eta in (0.4, 0.2, 0.1):
        log_policy = MU.log()
        for _ in range(1000):
            log_policy = nash_md_step(P, log_policy, MU.log(), tau, eta)
        distances.append(float((log_policy.exp() - target).abs().max()))
    assert distances[0] > distances[1] > distances[2] > 1e-3


def test_several_games_at_once_are_each_game():
    random = torch.Generator().manual_seed(1)
    games = torch.stack([random_game(4, random) for _ in range(3)])
    log_mu, log_policy = torch.randn(2, 3, 4, generator=random).double().log_softmax(-1)
    together = nash_md_step(games, log_policy, log_mu, 0.2, 0.5)
    for i in range(3):
        alone = nash_md_step(games[i], log_policy[i], log_mu[i], 0.2, 0.5)
        torch.testing.assert_close(together[i], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": -0.1}, "tau must be at least 0"),
        ({"eta": 3.0}, "eta tau at most 1"),
        ({"preferences": P + 0.1}, r"P \+ P\^T = 1 .* found a sum of 1.2"),
        ({"preferences": P[:2]}, r"\[..., K, K\], got \[2, 3\]"),
        ({"opponent": PI[:2]}, "one shape"),
    ],
)
def test_a_wrong_step_says_why(change, message):
    arguments = {
        "preferences": P, "log_policy": PI.log(), "opponent": PI, "log_mu": MU.log(),
        "tau": 0.5, "eta": 0.4, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mirror_step(**arguments)


# The mixture and the weights --------------------------------------------------------------------


def test_the_ends_of_the_mixture_are_its_parts_to_the_bit():
    first, second = torch.randn(2, 4, 7)
    first[0, 0] = second[1, 1] = -torch.inf
    assert geometric_mixture(first, second, 0.0) is first
    assert geometric_mixture(first, second, 1.0) is second
    between = geometric_mixture(first, second, 0.25).softmax(-1)
    expected = first.softmax(-1) ** 0.75 * second.softmax(-1) ** 0.25
    torch.testing.assert_close(between, expected / expected.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        geometric_mixture(first, second, 1.5)


def test_the_worked_example_of_the_policy_gradient():
    logprobs = torch.tensor([[-0.5, -1.0, -0.2, math.nan]])
    reference = torch.tensor([[-0.9, -0.6, -0.4, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    wins = torch.tensor([0.7])
    weights = nash_weights(wins, logprobs - reference, mask, 0.1)
    assert weights[0].tolist() == pytest.approx([0.18, 0.18, 0.18, 0])
    assert float(reinforce(logprobs, weights, mask).sum()) == pytest.approx(0.306)
    weights = nash_weights(wins, logprobs - reference, mask, 0.1, "token")
    assert weights[0].tolist() == pytest.approx([0.16, 0.24, 0.18, 0])
    assert float(reinforce(logprobs, weights, mask).sum()) == pytest.approx(0.356)


def expected_gradient(theta, opponent, preferences, tau):
    """Of the sampled loss over all one-token responses, y of the policy and y' of the opponent."""
    logits = theta.clone().requires_grad_()
    log_policy = logits.log_softmax(-1)
    mask = torch.ones(3, 1, dtype=torch.bool)
    ratio = (log_policy - MU.log()).unsqueeze(1)
    total = torch.zeros((), dtype=torch.float64)
    for other in range(3):
        weights = nash_weights(preferences[:, other], ratio, mask, tau)
        losses = reinforce(log_policy.unsqueeze(1), weights, mask).sum(1)
        total = total + opponent[other] * (log_policy.exp().detach() * losses).sum()
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize(("b", "tau"), [(0.125, 0.3), (0.0, 0.0), (1.0, 0.1)])
def test_in_expectation_it_is_the_gradient_of_the_game(b, tau):
    theta = PI.log()
    opponent = geometric_mixture(theta, MU.log(), b).softmax(-1)
    logits = theta.clone().requires_grad_()
    policy = logits.softmax(-1)
    value = policy @ P @ opponent - tau * divergence(policy, MU)
    expected = torch.autograd.grad(-value, logits)[0]
    torch.testing.assert_close(expected_gradient(theta, opponent, P, tau), expected)


def test_where_all_are_equally_good_only_the_divergence_pulls():
    even = torch.full((3, 3), 0.5, dtype=torch.float64)
    logits = PI.log().requires_grad_()
    (0.2 * divergence(logits.softmax(-1), MU)).backward()
    torch.testing.assert_close(expected_gradient(PI.log(), PI, even, 0.2), logits.grad)
    at_reference = expected_gradient(MU.log(), PI, even, 0.2)
    torch.testing.assert_close(at_reference, torch.zeros_like(at_reference))


def test_a_small_reward_is_reinforced_by_a_quarter_of_its_gap():
    gap = torch.tensor([1e-3, -2e-3])
    nothing = torch.zeros(2, 1)
    weights = nash_weights(torch.sigmoid(gap), nothing, nothing == 0, 0.0)
    torch.testing.assert_close(weights[:, 0], gap / 4, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wins": torch.tensor([1.1])}, r"\[0, 1\]"),
        ({"wins": torch.tensor([math.nan])}, r"\[0, 1\]"),
        ({"wins": torch.tensor([0.5, 0.5])}, "do not fit"),
        ({"tau": -1.0}, "at least 0"),
        ({"kl": "word"}, "'sequence' or 'token'"),
        ({"mask": torch.ones(1, 2)}, "boolean"),
    ],
)
def test_wrong_weights_say_why(change, message):
    arguments = {
        "wins": torch.tensor([0.5]),
        "log_ratio": torch.zeros(1, 2),
        "mask": torch.ones(1, 2).bool(),
        "tau": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        nash_weights(**arguments)


# Runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["sequence", "token"])
def test_the_loss_is_that_of_the_samples(kl):
    method = moved(made(beta=0.3, kl=kl))
    batch = method.collect(0)
    assert len(batch) == 8
    expected = []
    for i, said in enumerate(prefer(batch.texts, batch.opponents)):
        assert float(batch.wins[i]) == pytest.approx(said)
        now = method.policy.score([batch.prompts[i]], [batch.responses[i]]).logprobs[0]
        with method.policy.reference():
            before = method.policy.score([batch.prompts[i]], [batch.responses[i]]).logprobs[0]
        ratio = (now - before).detach()
        charged = ratio.sum() if kl == "sequence" else ratio
        expected.append(-((said - 0.5 - 0.3 * charged) * now).sum())
    value = torch.stack(expected).mean()
    loss, metrics = method.loss(batch)
    torch.testing.assert_close(loss, value, atol=1e-5, rtol=1e-4)
    loss.backward()
    got = [p.grad.clone() for p in method.policy.parameters()]
    method.policy.zero_grad()
    value.backward()
    for one, parameter in zip(got, method.policy.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-5, rtol=1e-3)
    assert metrics["kl_to_reference"] != 0


def test_the_opponent_is_the_policy_the_reference_or_between():
    method = moved(made(mixture=1.0), 0.1)
    prompts = method.prompts[:4]
    with method.policy.reference():
        reference = method.roll_out(prompts, "opponent", 0).texts
    assert method.opponents(prompts, 0).texts == reference
    own = method.roll_out(prompts, "opponent", 0).texts
    assert moved(made(mixture=0.0), 0.1).opponents(prompts, 0).texts == own
    assert own != reference
    between = moved(made(mixture=0.5), 0.1).opponents(prompts, 0).texts
    assert between not in (own, reference)


def test_the_average_lags_behind_by_the_recursion():
    method = made(opponent="average", decay=0.25)
    loop = LoopSettings(learning_rate=1e-2, clip_norm=0)
    optimise = Optimisers(method.modules(), loop, torch.device("cpu"))
    name, weight = next(iter(method.policy.named_parameters()))
    expected = weight.detach().clone()
    start = method.roll_out(method.prompts[:4], "opponent", 0).texts
    for step in range(3):
        batch = method.collect(step)
        expected = 0.75 * weight.detach() + 0.25 * expected
        method.update(batch, optimise)
        torch.testing.assert_close(method.average.weights[name], expected)
    assert method.opponents(method.prompts[:4], 0).texts != start
    with method.average.acting():
        assert torch.equal(weight, method.average.weights[name])


def test_an_average_that_never_moves_is_the_start():
    method = made(opponent="average", decay=1.0)
    start = method.opponents(method.prompts[:4], 0).texts
    loop = LoopSettings(learning_rate=1e-2, clip_norm=0)
    optimise = Optimisers(method.modules(), loop, torch.device("cpu"))
    for step in range(2):
        method.update(method.collect(step), optimise)
    assert method.opponents(method.prompts[:4], 0).texts == start


@pytest.mark.parametrize("setting", [{}, {"opponent": "average", "decay": 0.5}])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(setting, tmp_path):
    (tmp_path / "judge.py").write_text(inspect.getsource(prefer))
    settings = {
        **SMALL,
        **setting,
        "batch_size": 4,
        "rollout": {"samples": 2, "max_new_tokens": 5},
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "preference": f"{tmp_path / 'judge.py'}:prefer",
        "save_every": 2,
    }
    assert_resumes("nash-md", tmp_path, **settings)


@pytest.mark.parametrize(("tune", "gain"), [("full", 0.2), ("lora", 0.03)])
def test_it_learns_to_say_letters(tune, gain, tmp_path):
    train(
        "nash-md",
        data=ROWS,
        preference=prefer,
        eval_data=ROWS[:12],
        output=tmp_path / "run",
        steps=20,
        tune=tune,
        rollout={"samples": 4, "max_new_tokens": 5},
        batch_size=8,
        evaluate_every=20,
        frontier={"max_new_tokens": 5, "samples": 4},
        **{**SMALL, "learning_rate": 1e-2},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wins = [row["evaluation/win_rate"] for row in rows if "evaluation/win_rate" in row]
    assert wins[-1] > wins[0] + gain  # of seeds 0 to 2 the least gains: 0.33 and 0.06


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mixture": 1.5}, "mixture: .*less than or equal to 1, got 1.5"),
        ({"mixture": -0.1}, "mixture: .*greater than or equal to 0"),
        ({"decay": 2}, "decay: .*less than or equal to 1"),
        ({"beta": -1}, "beta: .*greater than or equal to 0"),
        ({"opponent": "past"}, "opponent: .*'mixture' or 'average', got 'past'"),
        ({"epochs": 2}, "epochs: .*1, got 2"),
        ({"minibatches": 2}, "minibatches: .*1, got 2"),
    ],
)
def test_a_bad_setting_is_named(setting, message, tmp_path):
    with pytest.raises(PostgradError, match=message) as caught:
        train("nash-md", data=ROWS, preference=prefer, output=tmp_path / "run", **SMALL, **setting)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
