"""Mixed preference optimisation: the split, the two stages, and the switch between them."""

import math

import pytest
import torch

from language_runs import SMALL, assert_same_run, moved, write_rows
from postgrad.advantages.selection import gap_split
from postgrad.api import resume, train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.mixed_po import MixedPO, MixedPOSettings
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

# the gap of vowels is 3, 2, 1 or 0 in turn, and every fifth label is wrong
TEXTS = [("aaax", "xxxx"), ("aaxx", "xxxz"), ("axxx", "xxzz"), ("xxxx", "zzzz")]
ROWS = [
    {
        "prompt": "abcdefgh"[i % 8],
        "chosen": TEXTS[i % 4][i % 5 == 4],
        "rejected": TEXTS[i % 4][i % 5 != 4],
    }
    for i in range(40)
]
UNEQUAL = [row for i, row in enumerate(ROWS) if i % 4 != 3]
SHORT = {
    "batch_size": 4,
    "epochs": 2,
    "dpo_steps": 2,
    "dpo_batch_size": 4,
    "rollout": {"samples": 1, "max_new_tokens": 6},
    "frontier": {"max_new_tokens": 6},
}
REWARD = """
def vowels(completions):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
"""


def vowels(completions):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def made(reward=vowels, steps=4, rows=ROWS, **config):
    values = {"model": "tiny", **SHORT, **config}
    given = {"data": rows, "eval_data": rows[:8], "reward": reward}
    found = MixedPO(validated(MixedPOSettings, values), Place(steps=steps), **given)
    found.check()
    return found


def optimisers(method):
    loop = LoopSettings(learning_rate=1e-3, token_budget=None)
    return Optimisers(method.modules(), loop, torch.device("cpu"), method.rates())


# The split ----------------------------------------------------------------------------------

CHOSEN = torch.tensor([2.0, 0.3, 1.0, -0.5], dtype=torch.float64)
REJECTED = torch.tensor([-1.0, 0.1, 0.2, 1.8], dtype=torch.float64)


def lists(split):
    return [part.tolist() for part in (split.easy, split.hard, split.dropped, split.swapped)]


@pytest.mark.parametrize(
    ("disagreement", "expected"),
    [
        ("keep", [[0, 3], [1, 2], [], []]),
        ("drop", [[0], [1, 2], [3], []]),
        ("flip", [[0, 3], [1, 2], [], [3]]),
    ],
)
def test_the_worked_example(disagreement, expected):
    """Gaps of 3, 0.2, 0.8 and -2.3; gamma 1."""
    assert lists(gap_split(CHOSEN, REJECTED, 1.0, disagreement=disagreement)) == expected


def test_only_gaps_count_and_their_scale_is_gammas():
    random = torch.Generator().manual_seed(0)
    chosen, rejected, level = torch.randn(3, 50, generator=random, dtype=torch.float64)
    split = gap_split(chosen, rejected, 0.7)
    assert sorted(torch.cat([split.easy, split.hard, split.dropped]).tolist()) == list(
        range(50)
    )  # each pair in one place
    assert lists(gap_split(chosen + level, rejected + level, 0.7)) == lists(split)
    assert lists(gap_split(4 * chosen, 4 * rejected, 2.8)) == lists(split)


def test_a_quantile_takes_that_share():
    chosen = torch.arange(10, dtype=torch.float64)
    split = gap_split(chosen, torch.zeros(10, dtype=torch.float64), quantile=0.3)
    assert split.hard.tolist() == [0, 1, 2]
    assert split.gamma == pytest.approx(2.7)


def test_the_limits():
    """gamma 0: easy is all that differs; infinity: all is hard."""
    chosen = torch.tensor([1.0, 2.0, 3.0])
    rejected = torch.tensor([0.0, 2.0, 1.0])
    assert lists(gap_split(chosen, rejected, 0.0))[:2] == [[0, 2], [1]]
    assert lists(gap_split(chosen, rejected, math.inf))[:2] == [[], [0, 1, 2]]


@pytest.mark.parametrize(
    ("chosen", "settings", "message"),
    [
        ([1.0, math.nan], {}, "finite"),
        ([1.0], {}, r"\[N\]"),
        ([1.0, 2.0], {"gamma": -1.0}, "at least 0"),
        ([1.0, 2.0], {"quantile": 1.0}, "between 0 and 1"),
        ([1.0, 2.0], {"disagreement": "ask"}, "keep, drop or flip"),
    ],
)
def test_a_wrong_call_says_why(chosen, settings, message):
    with pytest.raises(ValueError, match=message):
        gap_split(torch.tensor(chosen), torch.zeros(2), **settings)


def test_both_stages_together_are_one_with_the_sum_of_both_strengths():
    """beta 0.1 and then 0.05 are a beta of 1/30, also where each is found by optimisation."""
    random = torch.Generator().manual_seed(1)
    reference = torch.randn(5, generator=random, dtype=torch.float64).log_softmax(0)
    reward = 0.1 * torch.randn(5, generator=random, dtype=torch.float64)
    first = _dpo_optimum(reference, reward, 0.1)
    second = _rl_optimum(first, reward, 0.05)
    strength = 1 / (1 / 0.1 + 1 / 0.05)
    expected = (reference + reward / strength).log_softmax(0)
    assert strength == pytest.approx(0.033333, abs=1e-6)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=0)


def _dpo_optimum(reference, reward, beta):
    """The log-policy with the least DPO loss over all pairs with Bradley-Terry labels."""
    wins = torch.sigmoid(reward[:, None] - reward)

    def loss(policy):
        ratio = policy - reference
        margins = beta * (ratio[:, None] - ratio)
        return -(wins * torch.nn.functional.logsigmoid(margins)).mean()

    return _least(loss, reference)


def _rl_optimum(reference, reward, beta):
    return _least(
        lambda policy: (policy.exp() * (beta * (policy - reference) - reward)).sum(), reference
    )


def _least(loss, start):
    logits = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        value = 100 * loss(logits.log_softmax(0))
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach().log_softmax(0)


# The method ---------------------------------------------------------------------------------


def test_easy_pairs_come_first_and_then_the_prompts_of_hard_ones():
    found = made(gamma=1.5, steps=30)
    # gaps of 3 and 2 are easy; a fifth of the labels is against the reward
    assert len(found.split.easy) == 16
    assert len(found.split.dropped) == 4
    assert len(found.split.hard) == 20
    batch = found.collect(0)
    for chosen, rejected in batch.responses:
        won, lost = vowels([found.policy.decode(chosen), found.policy.decode(rejected)])
        assert won - lost in (2, 3)
    prompts = {found.policy.decode(p) for p in found.collect(2).prompts}
    assert prompts <= {ROWS[i]["prompt"] for i in found.split.hard.tolist()}
    assert len(prompts) == 4  # several pairs of one prompt count once


def test_flipped_labels_are_turned_round():
    found = made(gamma=1.5, disagreement="flip", dpo_batch_size=20)
    assert len(found.split.swapped) == 4
    for chosen, rejected in found.collect(0).responses:
        won, lost = vowels([found.policy.decode(chosen), found.policy.decode(rejected)])
        assert won > lost


def test_the_first_loss_is_dpos():
    found = moved(made(gamma=1.5, dpo_beta=0.3))
    batch = found.collect(0)
    with torch.no_grad():
        value, _ = found.pair_loss(batch)
        expected = []
        for prompt, pair in zip(batch.prompts, batch.responses, strict=True):
            now = found.policy.score([prompt] * 2, pair).logprobs.sum(1)
            with found.policy.reference():
                ratio = now - found.policy.score([prompt] * 2, pair).logprobs.sum(1)
            expected.append(-torch.nn.functional.logsigmoid(0.3 * (ratio[0] - ratio[1])))
    assert float(value) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)


def test_at_the_switch_the_reference_becomes_the_policy():
    found = made(gamma=1.5)
    optimise = optimisers(found)
    for step in range(2):
        found.update(found.collect(step), optimise)
    before = found.evaluate()
    assert before["kl"] == pytest.approx(before["kl_to_start"], abs=1e-5)
    assert abs(before["kl"]) > 1e-4
    batch = found.collect(2)
    torch.testing.assert_close(batch.old_logprobs, batch.reference_logprobs, rtol=0, atol=1e-6)
    after = found.evaluate()
    assert after["kl"] == pytest.approx(0, abs=1e-5)
    assert after["kl_to_start"] == before["kl_to_start"]


def test_it_learns(tmp_path):
    train(
        "mixed-po",
        data=ROWS * 4,
        reward=vowels,
        output=tmp_path,
        gamma=1.5,
        **{
            **SMALL,
            **SHORT,
            "steps": 22,
            "dpo_steps": 10,
            "dpo_batch_size": 32,
            "batch_size": 8,
            "rollout": {"samples": 4, "max_new_tokens": 6},
            "epochs": 4,
            "learning_rate": 2e-3,
            "critic_rate": 1.0,
        },
    )
    rows = read_rows(tmp_path / "metrics.jsonl")
    stages = [[r for r in rows if name in r] for name in ("split/easy", "reward")]
    assert [len(stage) for stage in stages] == [10, 12]
    assert stages[0][-1]["rewards/accuracy"] > 0.9
    rewards = [row["reward"] for row in stages[1]]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 1


@pytest.mark.parametrize("first", [1, 2, 3], ids=["before", "at", "after"])
def test_a_run_resumed_on_either_side_of_the_switch_is_the_same(first, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_rows(tmp_path / "held.jsonl", ROWS[:8]),
        "evaluate_every": 2,
        "reward": f"{reward}:vowels",
        "gamma": 1.5,
    }
    train("mixed-po", steps=4, output=tmp_path / "whole", **settings)
    _interrupted(tmp_path / "parts", first, settings)
    resume(tmp_path / "parts", steps=4, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def _interrupted(run, steps, settings):
    """A run of 4 steps whose checkpoints and rows after `steps` are gone."""
    train("mixed-po", steps=4, output=run, save_every=1, keep_checkpoints=9, **settings)
    for later in range(steps + 1, 5):
        (run / "checkpoints" / f"step-{later:08d}" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gamma": 10.0}, "gamma: no pair of rows is easy: .* 0 to 3 in size, gamma is 10"),
        ({"gamma": 0.0, "rows": UNEQUAL},
         "gamma: no pair of rows is hard"),
        ({"gamma": -1.0}, "gamma: .*greater than or equal to 0"),
        ({"tune": "lora"}, "tune: expected full, got lora"),
        ({"steps": 2}, "steps: expected more than dpo_steps = 2"),
        ({"reward": None}, "reward: rows brings no verifier"),
        ({"rows": [{"prompt": "a"}]}, "chosen"),
    ],
)  # fmt: skip
def test_faults_are_named_before_any_step(setting, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**setting)
    assert "\n" not in str(caught.value)


def test_a_reward_that_contradicts_the_labels_is_warned_of():
    def consonants(completions):
        return [-value for value in vowels(completions)]

    with pytest.warns(UserWarning, match="orders 2[78]% of the pairs as their labels do"):
        made(consonants, gamma=1.5, disagreement="keep")
