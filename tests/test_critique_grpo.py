"""Critique-GRPO: refinements after a critique, learnt as answers to the bare question."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, untimed, write_rows
from postgrad.advantages.group import group_mean_centred, group_standardised
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.critique_grpo import CritiqueGRPO
from postgrad.objectives.estimator import shaped_weight
from postgrad.objectives.policy_gradient import aggregate
from postgrad.rewards.corrections import Corrections
from postgrad.sampling.refinement import select_refinements

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
TEXT = "{prompt}|{response}|{critique}"


def first_letter(completions):
    return [float(text[:1].isalpha()) for text in completions]


def made(reward=first_letter, rows=ROWS, critique=None, **config):
    settings = {"model": "tiny", "refinement_text": TEXT, **SHORT, **config}
    return CritiqueGRPO(
        validated(CritiqueGRPO.Config, settings),
        Place(),
        data=rows,
        reward=reward,
        critique=critique,
    )


def nothing_right(completions):
    return [0.0] * len(completions)


def all_right(completions):
    return [1.0] * len(completions)


# The mathematics ---------------------------------------------------------------------------------


def test_the_example_of_a_mixed_group():
    reward = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 1])
    one = torch.zeros(8, dtype=torch.long)
    expected = torch.tensor([-0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25, 0.75])
    torch.testing.assert_close(group_mean_centred(reward, one), expected)
    by_deviation = group_standardised(reward, one, eps=1e-6)
    expected = torch.where(reward > 0, 1.620182, -0.540061)
    torch.testing.assert_close(by_deviation, expected, atol=4e-6, rtol=0)
    logprobs, mask = torch.tensor([[0.9, 0.5, 0.05]]).log(), torch.ones(1, 3).bool()
    losses = -0.75 * shaped_weight(logprobs, mask)
    torch.testing.assert_close(losses, torch.tensor([[-0.675, -0.625, -0.25]]))
    total = aggregate(losses, mask, "sequence-sum-constant", constant=4)
    assert total.item() == pytest.approx(-0.3875)


def test_only_the_refinement_right_of_eight():
    reward = torch.tensor([0.0] * 7 + [1.0])
    advantages = group_mean_centred(reward, torch.zeros(8, dtype=torch.long))
    assert advantages.tolist() == [-0.125] * 7 + [0.875]


def test_the_shapes_gradient_is_greatest_at_gamma_and_its_limits():
    probabilities = torch.linspace(0.01, 0.99, 99)[None]
    logprobs = probabilities.log().requires_grad_()
    mask = torch.ones(1, 99).bool()
    (slope,) = torch.autograd.grad(shaped_weight(logprobs, mask, 0.2).sum(), logprobs)
    torch.testing.assert_close(slope, 0.2 * probabilities / (probabilities + 0.2).square())
    assert probabilities[0, slope.argmax()].item() == pytest.approx(0.2)
    torch.testing.assert_close(1e4 * shaped_weight(logprobs, mask, 1e4), probabilities, rtol=1e-3,
                               atol=0)  # fmt: skip
    torch.testing.assert_close(
        shaped_weight(logprobs, mask, 1e-6), torch.ones(1, 99), atol=1e-3, rtol=0
    )


def test_the_first_right_refinement_is_kept_or_else_the_best():
    assert select_refinements(torch.tensor([0.0, 0, 1, 1])).tolist() == [2]
    assert select_refinements(torch.tensor([0.0, 0.0])).tolist() == [0]
    assert select_refinements(torch.tensor([0.1, 0.7, 0.3]), 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="1 <= kept <= n"):
        select_refinements(torch.tensor([0.0]), 2)


# Critiques ---------------------------------------------------------------------------------------


def test_critiques_say_right_or_wrong_and_the_answer():
    told = (ROWS[2:4], ["x", "6"], [0.0, 1.0], [False, True])
    assert Corrections("simple").of_rows(*told) == [
        "This solution is incorrect.",
        "This solution is correct.",
    ]
    assert Corrections("simple-gt").of_rows(*told) == [
        "This solution is incorrect. The correct answer is 4.",
        "This solution is correct. The correct answer is 6.",
    ]


def test_a_critique_of_ones_own_sees_what_a_reward_sees():
    def own(prompts, completions, rewards, answer):
        return [f"{p}{c}:{r:g}/{a}" for p, c, r, a in zip(prompts, completions, rewards, answer,
                                                          strict=True)]  # fmt: skip

    told = (ROWS[2:4], ["x", "6"], [0.0, 1.0], [False, True])
    assert Corrections(own).of_rows(*told) == ["02+02=x:0/4", "03+03=6:1/6"]
    fallen_back = Corrections(lambda completions: [None, "well"]).of_rows(*told)
    assert fallen_back == ["This solution is incorrect. The correct answer is 4.", "well"]
    with pytest.raises(PostgradError, match=r"returned 3 .* for completion 2, expected text"):
        Corrections(lambda completions: ["", 3]).of_rows(*told)


# The method --------------------------------------------------------------------------------------


def recorded(method):
    asked = []
    roll_out = method.roll_out

    def record(prompts, *stream, **more):
        found = roll_out(prompts, *stream, **more)
        asked.append(([method.policy.decode(prompt) for prompt in prompts], found.texts))
        return found

    method.roll_out = record
    return asked


def test_the_best_refinement_takes_the_place_of_the_first_response():
    method = made(critique="simple")
    asked = recorded(method)
    batch = method.collect(0)
    (prompts, first), (questions, second) = asked
    assert len(batch) == 16
    assert [len(batch.select((batch.group == g).nonzero().squeeze(1))) for g in range(4)] == [4] * 4
    for group in range(4):
        own = batch.select((batch.group == group).nonzero().squeeze(1))
        mine = first[4 * group : 4 * group + 4]
        assert all(method.policy.decode(prompt) == prompts[group] for prompt in own.prompts)
        if not own.refined.any():
            assert own.texts == mine
            assert all(first_letter(mine))
            continue
        assert own.refined.tolist() == [False] * 3 + [True]
        assert own.texts[:3] == mine[1:]
        place = questions.index(
            f"{prompts[group]}|{mine[0]}|This solution is "
            f"{'correct' if first_letter(mine[:1])[0] else 'incorrect'}."
        )
        refinements = second[place : place + 4]
        right = first_letter(refinements)
        assert own.texts[3] == refinements[right.index(1.0) if 1.0 in right else 0]
        torch.testing.assert_close(own.advantages, own.reward - own.reward.mean())
    metrics = method.describe_batch(batch)
    assert metrics["refinement/groups"] == len(questions) / 16 > 0
    assert metrics["refinement/right"] == batch.reward[batch.refined].mean().item()


def test_groups_that_are_right_throughout_are_not_refined():
    method = made(all_right)
    asked = recorded(method)
    batch = method.collect(0)
    assert len(asked) == 1
    assert not batch.refined.any()


@pytest.mark.parametrize("budget", [None, 30])
def test_the_loss_is_the_papers_by_hand(budget):
    method = made(entropy_coefficient=0.0, gamma=0.3, minibatches=2)
    batch = method.collect(0)
    assert 0 < int(batch.refined.sum()) <= 4
    moved(method)
    loss = sum(method.loss(part)[0] for part in batch.split(budget))
    expected = 0.0
    for i in range(16):
        one = batch.select(torch.tensor([i]))
        new = method.policy.score(one.prompts, one.responses).logprobs[0]
        if batch.refined[i]:
            weights = new.exp() / (new.exp() + 0.3)
        else:
            weights = (new - batch.old_logprobs[i, : len(new)]).exp()
        expected = expected - batch.advantages[i] * weights.sum() / (16 * 5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    own = torch.autograd.grad(loss, list(method.policy.parameters()))
    theirs = torch.autograd.grad(expected, list(method.policy.parameters()))
    for one, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_braces_of_a_response_are_not_taken_for_places():
    method = made()
    question = method._question({"prompt": "{response}"}, "{critique}", "{prompt}")
    assert question == "{response}|{critique}|{prompt}"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    asked = method._question({"prompt": turns}, "r", "c")
    assert [turn["content"] for turn in asked] == ["s", "u|r|c"]


def test_all_of_a_group_can_be_refined():
    method = made(nothing_right, refined=4)
    batch = method.collect(0)
    assert batch.refined.all()
    assert len(batch) == 16


def test_a_question_that_would_leave_no_room_is_not_asked():
    method = made(nothing_right, critique=lambda completions: ["x" * 2000] * len(completions))
    batch = method.collect(0)
    assert not batch.refined.any()
    assert len(batch) == 16


def test_it_learns_and_comes_to_do_without_critiques(tmp_path):
    settings = {**SMALL, **SHORT, "data": ROWS, "steps": 40, "learning_rate": 3e-3}
    run = train("critique-grpo", reward=first_letter, output=tmp_path / "run", refinement_text=TEXT,
                **settings)  # fmt: skip
    rows = [row for row in untimed(run.folder) if "reward" in row]
    assert sum(row["reward"] for row in rows[-5:]) / 5 > rows[0]["reward"] + 0.3
    assert rows[-1]["refinement/groups"] < rows[0]["refinement/groups"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def first_letter(completions):\n"
        "    return [float(text[:1].isalpha()) for text in completions]\n"
        "def short(completions):\n"
        "    return ['shorter' if len(text) > 3 else None for text in completions]\n"
    )
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "critique-grpo", tmp_path, data=data, reward=f"{reward}:first_letter",
        critique=f"{reward}:short", minibatches=2, **SMALL, **SHORT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refined": 5}, "refined: at most rollout.samples, 4, refinements .* got 5"),
        ({"refined": 0}, "refined: .*greater than 0"),
        ({"refinement_text": "{prompt}"}, "refinement_text: expected {response} in it"),
        ({"critique": "simpel"}, "unknown critique 'simpel': did you mean 'simple'"),
        ({"rows": [{"prompt": "1"}]}, "critique: simple-gt names the true answer"),
    ],
)
def test_what_it_cannot_use_is_named(settings, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**settings).check()
    assert "\n" not in str(caught.value)
