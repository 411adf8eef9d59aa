"""Problems in GSM8K's form: loaded, judged, and their graded solutions made into pairs.

Ours, and, where POSTGRAD_GSM8K names the folder of grade-school-math's data, all of them.
"""

import json
import os
import runpy
from pathlib import Path

import pytest

from language_runs import write_rows
from postgrad.rewards import load_rewards
from postgrad.tasks import load

FOLDER = os.environ.get("POSTGRAD_GSM8K")
PROBLEMS = [
    {
        "question": "A box holds 12 pens. Ann takes a third of them. How many pens are left?",
        "answer": "Ann takes 12/3 = <<12/3=4>>4 pens.\n12 - 4 = <<12-4=8>>8 are left.\n#### 8",
    },
    {
        "question": "A lorry carries 3 loads of 1,400 kg each. How many kg is that?",
        "answer": "That is 3 * 1400 = <<3*1400=4200>>4,200 kg.\n#### 4,200",
    },
]
SETTINGS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.fixture(params=["ours", "theirs"] if FOLDER else ["ours"])
def problems(request, tmp_path):
    if request.param == "theirs":
        return str(Path(FOLDER) / "test.jsonl")
    return write_rows(tmp_path / "problems.jsonl", PROBLEMS)


def test_a_problems_own_solution_is_right_and_a_neighbours_is_not(problems):
    data = load(problems, format="prompts", columns={"prompt": "question"})
    rewards = load_rewards("numeric")
    solutions = [json.loads(line)["answer"] for line in Path(problems).read_text().splitlines()]
    assert len(data.rows) == len(solutions)
    right, _ = rewards.of_rows(data.rows, solutions)
    assert right == [1.0] * len(solutions)
    shifted = [text + "1" for text in solutions]  # another last digit
    assert sum(rewards.of_rows(data.rows, shifted)[0]) == 0


def graded(number, flags):
    """A row of example_model_solutions.jsonl; `flags` say which of four solutions are right."""
    return {
        "question": f"What is {number} + 1?",
        "ground_truth": f"{number} + 1 = {number + 1}\nA: {number + 1}",
        **{
            name: {"is_correct": flag, "solution": f"It is {number + (1 if flag else 3)}."}
            for name, flag in zip(SETTINGS, flags, strict=True)
        },
    }


def test_graded_solutions_become_pairs_and_lists(tmp_path, monkeypatch):
    if FOLDER:
        source = str(Path(FOLDER) / "example_model_solutions.jsonl")
    else:
        rows = [graded(i, [i % 2 == 0, i % 3 == 0, True, False]) for i in range(40)]
        source = write_rows(tmp_path / "solutions.jsonl", rows)
    recipe = Path(__file__).parent.parent / "recipes" / "graded_solutions.py"
    monkeypatch.setattr("sys.argv", [str(recipe), source, str(tmp_path / "graded")])
    runpy.run_path(str(recipe), run_name="__main__")
    pairs = load(str(tmp_path / "graded" / "pairs-train.jsonl"))
    lists = load(str(tmp_path / "graded" / "lists-train.jsonl"))
    assert pairs.format == "preferences"
    assert lists.format == "rankings"
    assert len(pairs.rows) > 10
    assert len(lists.rows) > 10
    assert all(row["chosen"] != row["rejected"] for row in pairs.rows)
    assert all(len(set(row["scores"])) > 1 for row in lists.rows)
    tested = load(str(tmp_path / "graded" / "pairs-test.jsonl"))
    seen = [row["prompt"] for row in pairs.rows]
    assert tested.rows
    assert not any(row["prompt"] in seen for row in tested.rows)
