"""Group contrastive policy optimisation: the mask, the reward, and both in a run."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.group import group_standardised
from postgrad.advantages.group_contrast import bounded_length, group_contrast_mask
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.gcpo import GCPO, _within
from postgrad.methods.language.verifiable.grpo import GRPO
from postgrad.sampling.generation import Rollouts
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{kind}{i:02d}="} for i in range(8) for kind in "+-"]
SHORT = {"rollout": {"samples": 8, "max_new_tokens": 3}, "batch_size": 4}
# an upper-case letter is the behaviour; it is right where the prompt begins with +
BEHAVIOUR = {"auxiliary": "[A-Z]", "ask_for": "W{prompt}", "ask_not": "N{prompt}"}
REWARD = """
def capitals(prompts, completions):
    return [
        float(any(c.isupper() for c in text) == ("+" in prompt))
        for prompt, text in zip(prompts, completions)
    ]
"""


def capitals(prompts, completions):
    return [
        float(any(c.isupper() for c in text) == ("+" in prompt))
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def made(kind=GCPO, reward=capitals, **config):
    own = BEHAVIOUR if kind is GCPO else {}
    values = {"model": "tiny", **SHORT, **own, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS, reward=reward)


def rollouts(texts, lengths=None):
    """Responses as they come from sampling; nothing but their texts and lengths is looked at."""
    responses = [torch.zeros(n, dtype=torch.long) for n in lengths or map(len, texts)]
    return Rollouts(responses, responses, responses, torch.ones(len(texts)).bool(), list(texts))


# The mask and the reward -------------------------------------------------------------------------

WITH = torch.tensor([[True] * 4 + [False] * 4])
CORRECT = torch.tensor([[1.0, 1, 0, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("mask", "rewards", "advantages"),
    [
        (1.0, (1.55, 1.025, 0.6, 0.025), (1.160154, 0.348046, -0.309374, -1.198826)),
        (0.0, (1.05, 1.025, 0.1, 0.025), (0.886773, 0.842435, -0.798096, -0.931112)),
        (-1.0, (0.55, 1.025, -0.4, 0.025), (0.403129, 1.169074, -1.128761, -0.443442)),
    ],
)
def test_the_worked_example(mask, rewards, advantages):
    assert group_contrast_mask(CORRECT, WITH, 0.1).tolist() == [1.0]
    method = made(reference_length=400)
    found = method.worth(
        rollouts(["A", "a", "A", "a"], [200, 100, 400, 100]),
        torch.tensor([1.0, 1.0, 0.0, 0.0]),
        torch.full((4,), mask),
    )
    total = torch.stack(list(found.values())).sum(0)
    torch.testing.assert_close(total, torch.tensor(rewards))
    got = group_standardised(total, torch.zeros(4, dtype=torch.long), eps=1e-6)
    torch.testing.assert_close(got, torch.tensor(advantages), atol=2e-6, rtol=0)


def test_swapping_the_sides_flips_the_mask():
    random = torch.Generator().manual_seed(0)
    correct = (torch.rand(200, 6, generator=random) < 0.5).float()
    behaves = torch.rand(200, 6, generator=random) < 0.4
    mask = group_contrast_mask(correct, behaves, 0.1)
    assert set(mask.tolist()) == {-1.0, 0.0, 1.0}
    assert group_contrast_mask(correct, ~behaves, 0.1).equal(-mask)


def test_the_tolerance_is_a_strict_bound():
    correct = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    behaves = torch.tensor([[True, True, False, False]])
    assert group_contrast_mask(correct, behaves, 0.5).tolist() == [0.0]
    assert group_contrast_mask(correct, behaves, 0.49).tolist() == [1.0]
    assert group_contrast_mask(1 - correct, behaves, 0.49).tolist() == [-1.0]


def test_a_group_on_one_side_says_nothing():
    correct = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    behaves = torch.tensor([[True, True], [False, False], [False, False]])
    assert group_contrast_mask(correct, behaves, 0.0).tolist() == [0.0, 0.0, 0.0]


def test_each_prompt_has_its_own_mask():
    correct = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    behaves = torch.tensor([[True, False]] * 3)
    assert group_contrast_mask(correct, behaves, 0.1).tolist() == [1.0, -1.0, 0.0]


def test_wrong_calls_are_refused():
    one = torch.ones(1, 2)
    for call, message in (
        (lambda: group_contrast_mask(one, one, 0.1), "behaves boolean"),
        (lambda: group_contrast_mask(one[0], one[0].bool(), 0.1), r"must both be \[P, G\]"),
        (lambda: group_contrast_mask(one, one.bool(), -0.1), "at least 0"),
        (lambda: bounded_length(one[0], 0), "above 0"),
        (lambda: bounded_length(one[0] * torch.nan, 4), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_wrong_format_is_no_right_answer():
    method = made(format="[a-z]+", format_weight=0.2, length_weight=0.0)
    responses = rollouts(["abc", "a1c"])
    correct, _ = method.accuracy(responses, torch.tensor([1, 1]))  # no capitals: both are right
    assert correct.tolist() == [1.0, 0.0]
    worth = method.worth(responses, correct, torch.zeros(2))
    assert torch.stack(list(worth.values())).sum(0).tolist() == pytest.approx([1.2, 0.0])


def test_length_can_count_for_right_responses_alone():
    method = made(length_if_correct=True, reference_length=4)
    found = method.worth(rollouts(["ab", "ab"]), torch.tensor([1.0, 0.0]), torch.zeros(2))
    assert found["length"].tolist() == pytest.approx([0.05, 0.0])


def test_empty_constructions_do_not_count():
    method = made(auxiliary=GCPO.Config.model_fields["auxiliary"].default)
    texts = ["<aux>D on AB</aux> 12", "<aux> </aux> 12", "<aux>D on AB", r"\draw (A) -- (B);", "12"]
    assert method.behaves(rollouts(texts)).tolist() == [True, False, False, True, False]


def test_instructions_go_around_text_and_into_the_last_message():
    assert _within("1+1=", "({prompt})") == "(1+1=)"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert _within(turns, "{prompt}!")[1] == {"role": "user", "content": "u!"}
    assert turns[1]["content"] == "u"


# The method --------------------------------------------------------------------------------------


def test_without_the_two_terms_it_is_grpo():
    settings = {"auxiliary_weight": 0.0, "length_weight": 0.0, "kl_coefficient": 0.0}
    method = made(contrast="partition", **settings)
    other = made(GRPO, advantage={"name": "standardised", "eps": 1e-6})
    batch, expected = method.collect(0), other.collect(0)
    assert batch.texts == expected.texts
    torch.testing.assert_close(batch.advantages, expected.advantages)
    assert method.loss(batch)[0].item() == pytest.approx(other.loss(expected)[0].item())


def test_a_group_is_divided_by_the_behaviour():
    batch = made(contrast="partition").collect(0)
    assert len(batch) == 32
    seen = 0
    for group in range(4):
        here = batch.group == group
        behaves = batch.behaves[here]
        helps = ROWS[int(batch.row[here][0])]["prompt"][0] == "+"
        comparable = bool(behaves.any()) and not bool(behaves.all())
        seen += comparable
        expected = float(comparable) * (1.0 if helps else -1.0)
        assert batch.contrast[here].tolist() == [expected] * 8
    assert seen >= 2


def test_prompted_groups_decide_and_are_not_learnt_from():
    asked = []

    def reward(prompts, completions):
        asked.append(len(prompts))  # last the groups with and without, of two responses each
        return [0.0] * 32 + [1.0, 1.0, 0.0, 0.0] * 4

    method = made(reward=reward, contrast_samples=2)
    batch = method.collect(0)
    assert asked == [48]
    assert len(batch) == 32
    assert batch.contrast.tolist() == [1.0] * 32
    bonus = batch.reward - 0.1 * batch.mask.sum(1) / 3
    torch.testing.assert_close(bonus, 0.5 * batch.behaves.float())
    begins = {method.policy.decode(prompt)[0] for prompt in batch.prompts}
    assert begins == {"+", "-"}


def test_prompted_responses_are_drawn_after_their_instructions():
    method = made(contrast_samples=2)
    others = method.asked([3, 0], 0)
    texts = [method.policy.decode(prompt) for prompt in others.prompts]
    three, zero = ROWS[3]["prompt"], ROWS[0]["prompt"]
    assert texts == [f"W{three}"] * 2 + [f"N{three}"] * 2 + [f"W{zero}"] * 2 + [f"N{zero}"] * 2


def test_prompted_groups_can_be_learnt_from_as_groups_of_their_own():
    method = made(contrast_samples=2, train_contrast=True)
    batch = method.collect(0)
    assert len(batch) == 32 + 16
    assert batch.group.tolist()[32:] == [4] * 4 + [5] * 4 + [6] * 4 + [7] * 4
    # what is ordinary is as it is without them
    alone = made(contrast_samples=2).collect(0)
    assert batch.texts[:32] == alone.texts
    torch.testing.assert_close(batch.advantages[:32], alone.advantages)
    assert all(method.policy.decode(prompt)[0] in "WN" for prompt in batch.prompts[32:])
    loss, _ = method.loss(batch)
    loss.backward()
    assert bool(torch.isfinite(loss))


def test_the_behaviour_is_learnt_where_it_helps_and_unlearnt_where_it_hurts():
    """The verifier says nothing of the ordinary responses: the mask alone tells prompts apart."""

    def of_what_was_asked(prompts, completions):
        asked = [float(("+" in prompt) == (i % 4 < 2)) for i, prompt in enumerate(prompts)]
        return [0.0] * 32 + asked[32:]

    method = made(
        reward=of_what_was_asked, contrast_samples=2, length_weight=0.0, kl_coefficient=0.0
    )
    loop = LoopSettings(learning_rate=3e-3)
    optimise = Optimisers(method.modules(), loop, torch.device("cpu"))
    late = {True: [], False: []}
    for step in range(30):
        batch = method.collect(step)
        helps = torch.tensor([ROWS[i]["prompt"][0] == "+" for i in batch.row.tolist()])
        assert batch.contrast.equal(torch.where(helps, 1.0, -1.0))
        for side, behaves in zip(helps.tolist(), batch.behaves.tolist(), strict=True):
            if step >= 24:
                late[side].append(behaves)
        method.update(batch, optimise)
    assert sum(late[True]) / len(late[True]) > 0.9
    assert sum(late[False]) / len(late[False]) < 0.3


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "gcpo", tmp_path, data=data, reward=f"{reward}:capitals", contrast_samples=2,
        **BEHAVIOUR, **SMALL, **SHORT,
    )  # fmt: skip
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert {"auxiliary/rate", "auxiliary/helps", "reward/accuracy"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": -0.1}, "tolerance: .*greater than or equal to 0"),
        ({"ask_for": ""}, "ask_for: contrast=prompted needs a prompt with {prompt} in it, got ''"),
        ({"auxiliary": "("}, r"auxiliary: '\(' is no regular expression"),
        ({"auxiliary_weight": 0.95}, "auxiliary_weight, length_weight: .*below 1 .*got 1.05"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .*at least 2 samples, got 1"),
        ({"contrast": "asked"}, "contrast: .*'prompted' or 'partition'"),
        ({"tool": "calculator"}, "tool: contrast=prompted asks for single turns"),
        ({"contrast_samples": 0}, "contrast_samples: .*greater than 0"),
    ],
)
def test_faults_are_named_in_one_line(settings, message, tmp_path):
    given = {**SMALL, **SHORT, **BEHAVIOUR, "data": ROWS, "reward": capitals, **settings}
    with pytest.raises(PostgradError, match=message) as caught:
        train("gcpo", steps=1, output=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
