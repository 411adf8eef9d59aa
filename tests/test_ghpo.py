"""GHPO: hints where every response is wrong, GRPO everywhere else."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, untimed, write_rows
from postgrad.advantages.group import group_standardised
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.ghpo import GHPO
from postgrad.methods.language.verifiable.grpo import GRPO
from postgrad.sampling.hints import make_hint
from postgrad.tasks.formats import edited

ROWS = [
    {"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i), "solution": f"{i} twice is {2 * i}"}
    for i in range(24)
]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def first_letter(completions):
    return [float(text[:1] in "abcdefghijklm") for text in completions]


def made(reward=first_letter, rows=ROWS, kind=GHPO, **config):
    settings = {"model": "tiny", **SHORT, **config}
    return kind(validated(kind.Config, settings), Place(), data=rows, reward=reward)


def nothing_right(completions):
    return [0.0] * len(completions)


# Hints -------------------------------------------------------------------------------------------


def test_hints_are_rounded_beginnings():
    solution = "Step 1: add 3 and 4 to get 7. Step 2: double it to get 14."
    assert len(solution) == 58
    hints = [make_hint(solution, ratio) for ratio in (0.25, 0.5, 0.75)]
    assert [len(hint) for hint in hints] == [14, 29, 44]  # half to even
    assert hints[2].startswith(hints[1])
    assert hints[1].startswith(hints[0])
    assert make_hint(solution, 0.0) == ""
    assert make_hint(solution, 1.0) == solution
    with pytest.raises(ValueError, match="must lie in"):
        make_hint(solution, 1.5)


def test_hints_can_be_whole_lines_and_spare_the_answer():
    solution = "3 + 4 = 7\n7 + 7 = 14\n14"
    assert make_hint(solution, 0.5, "lines") == "3 + 4 = 7\n7 + 7 = 14\n"
    assert make_hint(solution, 1.0, "lines", answer="14") == "3 + 4 = 7\n7 + 7 = 14\n"
    assert make_hint(solution, 0.9, answer="7") == "3 + 4 = 7\n7 + "
    assert make_hint(solution, 0.25, answer="99") == make_hint(solution, 0.25)


def test_the_advantages_of_a_group_that_a_hint_rescued():
    reward = torch.tensor([1.5, 0.5, 1.5, 0, 0.5, 0.5, 0.5, 0.5])
    advantages = group_standardised(reward, torch.zeros(8, dtype=torch.long))
    expected = [1.531776, -0.353487, 1.531776, -1.296118] + [-0.353487] * 4
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-6, rtol=0)


# The method --------------------------------------------------------------------------------------


def seen_prompts(method):
    """What each group is asked, stage by stage."""
    asked = []
    roll_out = method.roll_out

    def recorded(prompts, *stream, **more):
        asked.append([method.policy.decode(prompt) for prompt in prompts])
        return roll_out(prompts, *stream, **more)

    method.roll_out = recorded
    return asked


def test_without_a_difficult_group_it_is_grpo_to_the_bit():
    def first(completions):
        return [float(i % 4 == 0) for i in range(len(completions))]

    method, plain = made(first), made(first, kind=GRPO, aggregation="token-mean")
    batch, expected = method.collect(0), plain.collect(0)
    assert batch.texts == expected.texts
    assert torch.equal(batch.advantages, expected.advantages)
    assert torch.equal(method.loss(batch)[0], plain.loss(expected)[0])


def test_without_ratios_it_is_grpo():
    method = made(nothing_right, hint_ratios=[], solution_column="none")
    plain = made(nothing_right, kind=GRPO)
    assert method.collect(3).texts == plain.collect(3).texts


def test_only_groups_that_are_all_wrong_are_asked_again_with_more_of_the_solution():
    method = made()
    asked = seen_prompts(method)
    batch = method.collect(0)
    assert 1 < len(asked) <= 4
    counts = [len(prompts) for prompts in asked]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 4
    for stage in range(1, len(asked)):
        before = asked[stage - 1]
        for prompt in asked[stage]:
            assert any(
                prompt.startswith(old[: len("00+00=")]) and len(prompt) > len(old) for old in before
            )
    right = method.solved(batch)
    assert batch.group.tolist() == sorted(batch.group.tolist())
    for group in range(4):
        own = batch.select((batch.group == group).nonzero().squeeze(1))
        assert len(own) == 4
        prompt = method.policy.decode(own.prompts[0])
        row = ROWS[int(own.row[0])]
        stage = int(own.stage[0])
        assert own.stage.unique().tolist() == [stage]
        assert prompt.startswith(row["prompt"])
        assert ("begins like this" in prompt) == (stage > 0)
        assert prompt in asked[stage]
        if stage < 3:
            assert bool(right[batch.group == group].any())
    metrics = method.describe_batch(batch)
    assert metrics["hint/responses"] == 4 * sum(counts)


def test_a_question_that_no_hint_helps_with_keeps_its_last_attempt():
    method = made(nothing_right)
    batch = method.collect(0)
    assert batch.stage.tolist() == [3] * 16
    metrics = method.describe_batch(batch)
    assert (metrics["hint/all_wrong"], metrics["hint/0.75"]) == (1.0, 1.0)
    assert metrics["hint/responses"] == 64
    for prompt, row in zip(batch.prompts, batch.row.tolist(), strict=True):
        text = method.policy.decode(prompt)
        hint = text.partition("there:\n")[2]
        solution = ROWS[row]["solution"]
        assert hint
        assert solution.startswith(hint)
        assert len(hint) <= solution.rindex(ROWS[row]["answer"])


def test_hints_begin_late_and_a_cold_start_hints_at_all():
    late = made(nothing_right, start_hint_step=2)
    assert late.collect(1).stage.tolist() == [0] * 16
    assert late.collect(2).stage.tolist() == [3] * 16
    cold = made(lambda completions: [1.0] * len(completions), cold_start_steps=1)
    asked = seen_prompts(cold)
    assert cold.collect(0).stage.tolist() == [0] * 16
    assert all("begins like this" in prompt for prompt in asked[0])
    cold.collect(1)
    assert not any("begins like this" in prompt for prompt in asked[1])


def test_responses_can_be_learnt_under_the_question_alone():
    hinted, original = made(nothing_right), made(nothing_right, logprob_prompt="original")
    first, second = hinted.collect(0), original.collect(0)
    assert first.texts == second.texts
    for one, other, row in zip(first.prompts, second.prompts, second.row.tolist(), strict=True):
        assert len(other) < len(one)
        assert hinted.policy.decode(other) == ROWS[row]["prompt"]
    assert second.shared_cost.tolist() == [len(prompt) for prompt in second.prompts]


def test_in_a_conversation_the_hint_goes_to_the_users_last_turn():
    turns = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "Well"},
    ]
    changed = edited(turns, lambda text: text + "?")
    assert [turn["content"] for turn in changed] == ["Add.", "1+1=?", "Well"]
    assert turns[1]["content"] == "1+1="
    with pytest.raises(PostgradError, match="no turn of the user"):
        edited(turns[:1], str.upper)


def test_solutions_may_be_in_the_column_of_answers_as_in_gsm8k():
    rows = [{"prompt": "1+1=", "answer": "One and one are 2.\n#### 2"}] * 4
    method = made(nothing_right, rows, solution_column="answer", hint_ratios=[0.5, 0.99])
    texts = [method.policy.decode(prompt) for prompt in method.collect(0).prompts]
    assert texts[0].endswith("from there:\nOne and one are 2.\n#### ")


def test_difficulty_is_by_accuracy_and_advantages_by_the_whole_reward():
    method = made([nothing_right, letters], accuracy="nothing_right")
    batch = method.collect(0)
    assert batch.stage.tolist() == [3] * 16
    assert bool(batch.advantages.any())


def test_it_trains_and_resumes_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def first_letter(completions):\n"
        "    return [float(text[:1] in 'abcdefghijklm') for text in completions]\n"
    )
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "ghpo", tmp_path, data=data, reward=f"{reward}:first_letter", minibatches=2,
        **SMALL, **SHORT,
    )  # fmt: skip
    assert any(row.get("hint/0.25", 0) > 0 for row in untimed(tmp_path / "whole"))


def test_it_learns_and_comes_to_do_without_hints(tmp_path):
    settings = {**SMALL, **SHORT, "reward": first_letter, "steps": 40, "learning_rate": 3e-3}
    run = train("ghpo", data=ROWS, output=tmp_path / "run", **settings)
    rows = [row for row in untimed(run.folder) if "reward" in row]

    def mean(name, part):
        return sum(row[name] for row in part) / len(part)

    assert mean("reward", rows[-8:]) > mean("reward", rows[:8]) + 0.3
    assert mean("hint/responses", rows[-8:]) < 0.8 * mean("hint/responses", rows[:8])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hint_ratios": [0.5, 0.25]}, "hint_ratios: expected rising numbers between 0 and 1"),
        ({"hint_ratios": [0.5, 1.0]}, "hint_ratios: expected rising numbers between 0 and 1"),
        ({"hint_text": "Hint:"}, "hint_text: expected {hint} in it, got 'Hint:'"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .* at least 2"),
        ({"solution_column": "proof"}, "solution_column: rows has no column 'proof'; .*solution"),
        ({"rows": [*ROWS[:1], {"prompt": "2=", "answer": "2"}]}, "row 2: column 'solution'.*empty"),
        (
            {"rows": [{**ROWS[0], "solution": "9" * 2000}]},
            "rows with hints, row 1: the prompt has .* tokens, at most 1019 fit",
        ),
    ],
)
def test_what_it_cannot_use_is_named(settings, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**settings)
    assert "\n" not in str(caught.value)
