"""Every method on verifiable rewards on the same footing: `make study-verifiable`.

On each of three tasks a small transformer is warmed up by demonstrations until it solves about
two fifths of the problems. From there every method gets the same samples, learning rate and
seeds; greedy answers to 1000 other draws of the task are measured. Methods that imitate (sft, otr)
learn from the answers themselves, one demonstration for each sample of the others. Runs that are
there are kept, so an interrupted call continues.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from postgrad.catalogue import entries
from postgrad.claims.addition_warm_up import untrained
from postgrad.claims.stepping import train_in_steps
from postgrad.comparison import Contender, compare
from postgrad.evaluation.language import evaluate_policy
from postgrad.reports.compare import write_compare_report
from postgrad.tasks import load
from postgrad.training.record import METRICS, read_rows

BASELINES = (
    "reinforce", "reinforce-plus-plus", "rloo", "grpo", "dr-grpo", "dapo", "gspo", "ppo-language",
    "sft", "best-of-n",
)  # fmt: skip
REWARD = "exact"  # right or wrong; reasoning-gym's own verifiers give parts of a point
PROMPTS, SAMPLES, RATE, TESTED = 20, 8, 3e-4, 1000
SHOWN = ("reward/degenerate_groups", "response/entropy", "response/length", "gradient_norm")
_TARGET, _MOST_STEPS, _CHECK_EVERY, _CHECKED, _BATCH = 0.4, 3000, 10, 200, 96


@dataclass(frozen=True)
class Task:
    """A task by name, with settings, the longest answer in tokens, and the model's positions."""

    name: str
    settings: dict[str, Any]
    tokens: int
    positions: int

    @property
    def title(self) -> str:
        return self.name.rpartition("/")[2]


TASKS = (
    Task("addition", {"digits": 3, "size": 20_000}, tokens=6, positions=32),
    Task(
        "reasoning-gym/chain_sum",
        {"max_terms": 2, "max_digits": 2, "min_digits": 1, "size": 20_000},
        tokens=6,
        positions=128,
    ),
    Task(
        "reasoning-gym/spell_backward",
        {"min_word_len": 3, "max_word_len": 6, "size": 20_000},
        tokens=8,
        positions=96,
    ),
)


def warmed_up(task: Task, folder: Path) -> None:
    """Put into `folder` a small GPT-2 that has learnt from answers up to `_TARGET`."""
    if folder.is_dir():
        return
    policy = untrained(0, task.positions)
    # other problems than those of the methods' training and tests: another seed of the stream
    data = load(task.name, split="train", settings=task.settings, seed=1000)
    check = replace(data.first(_CHECKED), verifier=REWARD)
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in data.rows[_CHECKED:]]
    training = train_in_steps(
        "sft",
        0,
        {"model": policy, "data": rows},
        steps=_MOST_STEPS,
        batch_size=_BATCH,
        learning_rate=2e-3,
        max_response_tokens=task.tokens,
    )
    for step, _ in training:
        if step % _CHECK_EVERY:
            continue
        solved = evaluate_policy(policy, check, task.tokens)["reward"]
        if solved >= _TARGET:
            break
    click.echo(f"{task.title}: warmed up for {step} steps, solves {solved:.2f}", err=True)
    policy.save(folder)


def contenders(steps: int, tokens: int) -> list[str]:
    """Every method that learns from verifiable rewards, and the baselines."""
    own = {
        "dapo-direct-advantage": f"gather_steps={steps // 2}",  # its first part samples
        "t-ppo": f"window={tokens // 2}",
        "gcpo": "contrast=partition",  # the model follows no instructions
    }
    return [
        f"{slug}:{own[slug]}" if slug in own else slug
        for slug, entry in entries().items()
        if entry.family == "language/verifiable" or slug in BASELINES
    ]


def settings_of(task: Task, model: Path) -> dict[str, Any]:
    """What is the same for all; each method takes what it has."""
    return {
        "model": str(model),
        "data": {"name": task.name, "settings": task.settings},
        "solution_column": "answer",
        "eval_size": TESTED,
        "batch_size": PROMPTS,
        "reward": REWARD,
        "rollout": {"samples": SAMPLES, "max_new_tokens": task.tokens},
        "max_response_tokens": task.tokens,
        "frontier": {
            "reward": REWARD,
            "max_new_tokens": task.tokens,
            "temperature": 0.0,  # as all others are measured
        },
        "learning_rate": RATE,
        "warmup_steps": 0,
        "schedule": "constant",
        "precision": "fp32",
        "log": [],
        "save_every": 0,
        "evaluate_every": 0,  # before and after
    }


def rows_of(runs: Path, task: Task, method: str, seed: int) -> Iterator[dict[str, Any]]:
    """A run's metrics under the name of its task."""
    for row in read_rows(runs / f"{Contender(method).folder}-seed{seed}" / METRICS):
        found = {"step": row["step"]}
        if "evaluation/reward" in row:
            found[f"evaluation/{task.title}"] = row["evaluation/reward"]
        found |= {f"{task.title}/{name}": row[name] for name in SHOWN if name in row}
        yield found


@click.command()
@click.option("--output", default="runs/study-verifiable", type=click.Path(path_type=Path))
@click.option("--budget", default=6400, show_default=True, help="Samples a run.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Runs at once.")
def main(output: Path, budget: int, seeds: int, jobs: int) -> None:
    """Compare all methods on three tasks; one page, one table, one JSON file."""
    together: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for task in TASKS:
        model, runs = output / f"{task.title}-model", output / task.title
        warmed_up(task, model)
        methods = contenders(budget // (PROMPTS * SAMPLES), task.tokens)
        table, _ = compare(
            methods,
            budget=budget,
            seeds=seeds,
            output=runs,
            jobs=jobs,
            say=lambda line: click.echo(line, err=True),
            **settings_of(task, model),
        )
        click.echo(f"{task.name}\n{table}\n")
        for method in methods:
            for seed in range(seeds):
                own = together.setdefault((Contender(method).method, seed), [])
                own += rows_of(runs, task, method, seed)
    page = write_compare_report(
        [{"method": m, "seed": s, "metrics": rows} for (m, s), rows in together.items()],
        output / "report.html",
        title="Methods on verifiable rewards, on the same footing",
        config={"samples a run": budget, "prompts a step": PROMPTS, "samples a prompt": SAMPLES,
                "learning rate": RATE, "test problems": TESTED},
    )  # fmt: skip
    study = {
        "budget": budget,
        "seeds": seeds,
        "date": time.strftime("%Y-%m-%d"),
        "methods": summary(together),
    }
    (output / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    click.echo(f"page: {page}")


def summary(
    together: Mapping[tuple[str, int], list[dict[str, Any]]],
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Of every method and task, seed by seed: accuracy before and after, and what it went with.

    Silent groups are those whose samples all have one reward, a mean over the steps; entropy is
    that of the last step, in nats a token.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (method, _), rows in together.items():
        for task in TASKS:
            columns = {
                name: [row[key] for row in rows if key in row]
                for name, key in (
                    ("accuracy", f"evaluation/{task.title}"),
                    ("silent groups", f"{task.title}/reward/degenerate_groups"),
                    ("entropy", f"{task.title}/response/entropy"),
                )
            }
            into = found.setdefault(method, {}).setdefault(task.title, {})
            accuracy, silent, entropy = columns.values()
            numbers = {"before": accuracy[:1], "after": accuracy[-1:], "entropy": entropy[-1:]}
            numbers["silent groups"] = [sum(silent) / len(silent)] if silent else []
            for name, values in numbers.items():
                for value in values:
                    into.setdefault(name, []).append(round(value, 4))
    return found


if __name__ == "__main__":
    main()
