"""Graded solutions of GSM8K's test problems as preference pairs and ranked lists.

    python recipes/graded_solutions.py example_model_solutions.jsonl graded

The file is in https://github.com/openai/grade-school-math (MIT licence): four models' solutions to
each problem, and whether each is right. Problems on which all models agree say nothing and are left
out. Every fourth of the rest is held out:

    pairs-train.jsonl, pairs-test.jsonl    a right and a wrong solution: prompt, chosen, rejected
    lists-train.jsonl, lists-test.jsonl    all four: prompt, responses, scores (1 right, 0 wrong)
"""

import json
import re
import sys
from pathlib import Path

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def graded(path: Path) -> list[dict]:
    """Problems with right and wrong solutions, as ranked lists."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        # what the calculator was asked for stands in << >>
        scores = {
            re.sub("<<.*?>>", "", problem[model]["solution"]): float(problem[model]["is_correct"])
            for model in MODELS
        }
        if len(set(scores.values())) == 2:
            prompt = [{"role": "user", "content": problem["question"]}]
            rows.append(
                {"prompt": prompt, "responses": list(scores), "scores": list(scores.values())}
            )
    return rows


def pair(row: dict) -> dict:
    """The first right and the first wrong solution of a list."""
    ranked = dict(zip(row["scores"][::-1], row["responses"][::-1], strict=True))
    return {"prompt": row["prompt"], "chosen": ranked[1.0], "rejected": ranked[0.0]}


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    rows = graded(source)
    for split, lists in (
        ("train", [row for i, row in enumerate(rows) if i % 4]),
        ("test", rows[::4]),
    ):
        for name, kept in (("pairs", map(pair, lists)), ("lists", lists)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            (folder / f"{name}-{split}.jsonl").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(rows)} problems with right and wrong solutions in {folder}\n")


if __name__ == "__main__":
    main()
