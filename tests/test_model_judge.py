"""Language models that compare two responses."""

import pytest

from language_runs import SMALL, write_rows
from postgrad.api import train
from postgrad.errors import PostgradError
from postgrad.rewards.comparing import COMPARE, ModelJudge, verdict
from postgrad.rewards.preferences import load_preference


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Better: A", True),
        ("B is vague.\nbetter: **B**", False),
        ("At first better: A. No.\nBetter: B", False),
        (" a. ", True),
        ("Both are fine", None),
        ("A good answer would", None),
        ("", None),
    ],
)
def test_verdicts(text, first):
    assert verdict(text) is first


def longer(prompts, n=1, **settings):
    """Prefers the longer response, and where they are equally long the one it sees first."""
    answers = []
    for prompt in prompts:
        first = prompt.split("Response A:\n")[1].split("\n\nResponse B:")[0]
        second = prompt.split("Response B:\n")[1].split("\n\nGive your")[0]
        answers.append([f"Better: {'A' if len(first) >= len(second) else 'B'}"] * n)
    return answers


def test_a_judge_that_favours_what_it_sees_first_is_made_fair():
    judge = ModelJudge(longer)
    assert judge(["p"] * 3, ["long", "a", "ab"], ["a", "long", "cd"]) == [1.0, 0.0, 1.0]
    fair = load_preference(judge, None)
    rows = [{"prompt": "p"}] * 3
    assert fair(rows, ["long", "a", "ab"], ["a", "long", "cd"]) == [1.0, 0.0, 0.5]


def test_the_probability_is_the_share_of_answers():
    texts = ["Better: A", "Better: B", "Better: A", "cannot say"]
    judge = ModelJudge(lambda prompts, n, **settings: [texts] * len(prompts), answers=4)
    assert judge(["p"], ["x"], ["y"]) == [(1 + 0 + 1 + 0.5) / 4]


def test_a_judge_that_says_nothing_stops():
    judge = ModelJudge(lambda prompts, n, **settings: [["I\nlike both"]] * len(prompts))
    with pytest.raises(PostgradError, match=r"2 of 2 answers name neither A nor B.*'I like both'"):
        judge(["p", "p"], ["x", "x"], ["y", "y"])
    with pytest.raises(PostgradError, match=r"judge_instruction: expected a text with \{second\}"):
        ModelJudge(longer, COMPARE.replace("{second}", ""))


def test_a_model_judges_in_training_or_says_that_it_cannot(tmp_path):
    """The tiny model writes noise, which no verdict can be read from."""
    settings = {
        **SMALL,
        "data": write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}+1="} for i in range(4)]),
        "batch_size": 2,
        "rollout": {"samples": 2, "max_new_tokens": 4},
        "judge": "tiny",
    }
    with pytest.raises(PostgradError, match="answers name neither A nor B"):
        train("online-dpo", steps=1, output=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    with pytest.raises(PostgradError, match="judge: give either preference or judge, not both"):
        train("online-dpo", output=tmp_path / "run", preference="a.py:b", **settings)
