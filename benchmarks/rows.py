"""What a benchmark finds: rows, kept as JSON together with the machine and the versions."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Outcome


@dataclass(frozen=True)
class Setting:
    """How a benchmark is run: counted turns, the folder of the model, and whether as a trial."""

    repeats: int
    model: str
    quick: bool = False


@dataclass
class Row:
    """One measurement of ours, with that of a peer where there is one.

    Attributes:
        name: what was measured, in which setting.
        unit: of `ours` and `theirs`; of seconds less is better, of all else with a peer more.
        ours: our number (median over turns).
        peer: the name of what we are compared with; None for a property of our own.
        theirs: its number.
        reach: what is aimed at: of the ratio if there is a peer, else of `ours`.
        at_most: whether `reach` is an upper limit, for rows without a peer.
        memory: our peak in bytes above imports, weights, gradients and optimiser state.
        peer_memory: the peer's.
        memory_reach: how many times ours the peer's memory is to be.
        failure: why there is no result.
        note: what a reader has to know to read the row.
        turns: the seconds of every counted turn, by contender.
    """

    name: str
    unit: str = "s"
    ours: float | None = None
    peer: str | None = None
    theirs: float | None = None
    reach: float | None = None
    at_most: bool = False
    memory: int | None = None
    peer_memory: int | None = None
    memory_reach: float | None = None
    failure: str | None = None
    note: str = ""
    turns: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer we are; below 1 the peer wins."""
        if self.ours is None or self.theirs is None:
            return None
        return self.theirs / self.ours if self.unit == "s" else self.ours / self.theirs

    @property
    def memory_ratio(self) -> float | None:
        """How many times our memory the peer takes."""
        if self.memory is None or self.peer_memory is None:
            return None
        return self.peer_memory / max(self.memory, 2**20)  # a mebibyte is within the noise

    @property
    def reached(self) -> bool | None:
        """Whether the reach is met; None where there is none, or no result."""
        judged = self.ratio if self.peer else self.ours
        if self.reach is None or judged is None:
            return None
        return judged <= self.reach if self.at_most else judged >= self.reach

    @property
    def memory_reached(self) -> bool | None:
        if self.memory_reach is None or self.memory_ratio is None:
            return None
        return self.memory_ratio >= self.memory_reach


def compared(
    name: str,
    peer: str,
    outcomes: dict[str, Outcome],
    *,
    ours: str = "ours",
    rate: str | None = None,
    reach: float | None = None,
    memory_reach: float | None = None,
    note: str = "",
    timed: bool = True,
) -> Row:
    """The row of `ours` against `peer`: seconds a turn, or `rate` of a turn's numbers a second.

    Without `timed` memory alone is compared.
    """
    we, they = outcomes[ours], outcomes[peer]
    row = Row(
        name,
        unit=f"{rate}/s" if rate else "s",
        peer=peer,
        reach=reach,
        memory_reach=memory_reach,
        note=note,
        turns={"ours": we.seconds, peer: they.seconds} if timed else {},
    )
    failures = [f"{who}: {o.failure}" for who, o in ((ours, we), (peer, they)) if o.failure]
    row.failure = "\n".join(failures) or None
    if we.failure is None:
        row.memory = we.peak
    if they.failure is None:
        row.peer_memory = they.peak
    if timed and we.failure is None:
        row.ours = we.rate(rate) if rate else we.time
    if timed and they.failure is None:
        row.theirs = they.rate(rate) if rate else they.time
    return row


@dataclass
class Results:
    """The rows of one benchmark, and where and when they were measured."""

    benchmark: str
    what: str
    rows: list[Row]
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                **asdict(row),
                "ratio": row.ratio,
                "reached": row.reached,
                "memory_ratio": row.memory_ratio,
                "memory_reached": row.memory_reached,
            }
            for row in self.rows
        ]
        text = json.dumps({**asdict(self), "rows": rows}, indent=1, ensure_ascii=False)
        (folder / f"{self.benchmark}.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> "Results":
        saved = json.loads(file.read_text(encoding="utf-8"))
        names = Row.__dataclass_fields__
        saved["rows"] = [
            Row(**{name: value for name, value in row.items() if name in names})
            for row in saved["rows"]
        ]
        return cls(**saved)
