"""What a person sees while a run goes on: a progress line and, now and then, a sample."""

from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from postgrad.secrecy import blanked
from postgrad.visible import shortened, visible


class Watcher(Protocol):
    """What the loop tells whoever watches."""

    def say(self, line: str) -> None: ...
    def step(self, step: int, metrics: dict[str, float], seconds: dict[str, float]) -> None: ...
    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...


class Silent:
    """Nobody watches."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def step(self, step: int, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        pass

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        pass


class Terminal:
    """A progress bar in a terminal; plain lines where the output is no terminal."""

    def __init__(self, steps: int, start: int):
        self._console = Console(stderr=True, highlight=False)
        self._steps = steps
        self._progress = Progress(
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=steps, completed=start)

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        self._console.print(Text(visible(blanked(line))), soft_wrap=True)

    def step(self, step: int, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        total = seconds.get("step", 0.0)
        split = " ".join(
            f"{name} {value:.1f}"
            for name, value in seconds.items()
            if name != "step" and value >= 0.05
        )
        shown = [f"{key} {metrics[key]:.4g}" for key in ("loss", "reward") if key in metrics]
        if metrics.get("throughput/tokens_per_second"):
            shown.append(f"{metrics['throughput/tokens_per_second']:.0f} tokens/s")
        line = f"{total:.1f} s/step ({split}) {' '.join(shown)}"
        self._progress.update(self._task, completed=step, description=line)
        if not self._console.is_terminal:
            self._console.print(Text(f"step {step}/{self._steps}: {line}"), soft_wrap=True)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        width = min(100, self._console.width)
        table = Table(title=f"sample after step {step}", show_header=False, width=width)
        for key, value in rows[0].items():
            name = Text(visible(key))
            if isinstance(value, float):
                table.add_row(name, f"{value:.4g}")
            elif isinstance(value, str) and not value.startswith("data:"):
                # a sample is a model's words: shown as text, never as markup
                table.add_row(name, Text(visible(shortened(blanked(value), 400))))
        self._console.print(table)
