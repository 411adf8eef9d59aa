"""Every task of reasoning-gym, with its own difficulty settings and verifier."""

import dataclasses
from typing import Any

from postgrad.errors import MissingExtra, PostgradError, unknown
from postgrad.tasks.examples import REASONING_GYM, Examples
from postgrad.tasks.settings import whole_number, with_defaults

# Item i of a task comes from the random seed `seed + i`, so ranges of seeds are kept apart: one of
# MAXIMUM_SIZE for each training seed below TEST_SEED, one for the test split from there on.
MAXIMUM_SIZE = 2**16
TEST_SEED = 2**31
DEFAULT_SIZE = 500


def load_reasoning(task: str, split: str, settings: dict[str, Any], seed: int) -> Examples:
    """`size` questions of a task of reasoning-gym; the other settings are the task's own."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingExtra("reasoning-gym", "tasks") from error
    name = REASONING_GYM + task
    if task not in DATASETS:
        raise unknown("task of reasoning-gym", task, DATASETS)
    fields = dataclasses.fields(DATASETS[task][1])
    own = dict.fromkeys((f.name for f in fields if f.name != "seed"), None)
    with_defaults(name, settings, own)
    size = whole_number(name, "size", settings.get("size", DEFAULT_SIZE), 1, MAXIMUM_SIZE)
    first = TEST_SEED if split == "test" else seed * MAXIMUM_SIZE % TEST_SEED
    try:
        dataset = reasoning_gym.create_dataset(task, **{**settings, "size": size, "seed": first})
        entries = [dataset[i] for i in range(size)]
    except (AssertionError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PostgradError(f"{name}: settings {settings} are refused ({reason})") from error
    difficulty = {key: value for key, value in settings.items() if key != "size"}
    summed = task == "chain_sum"
    rows = [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "entry": entry,
            "task": task,
            "task_settings": difficulty,
            **({"solution": worked_sum(entry["metadata"]["expression"])} if summed else {}),
        }
        for entry in entries
    ]
    return Examples(
        name, "prompts", rows, list(range(1, size + 1)), chat=True, verifier="reasoning-gym"
    )


def worked_sum(expression: str) -> str:
    """`1 + 2 - 4` worked out, a line for each step, and the answer in tags.

    It is the solution of a task of chain_sum, which methods learn from that ask for one.
    """
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return "\n".join([*lines, f"<answer>{total}</answer>"])
