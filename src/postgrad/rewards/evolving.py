"""A reward by a rubric that is rewritten while a policy learns from it.

A judge scores every response by the items of a rubric:

    def judge(prompts, completions, rubric, **columns) -> list

`rubric` is a list of `Item`. It returns for every completion a list with one number an item, or a
mapping with these `scores` and an `evaluation` in words; None in place of a number says that the
judge's words could not be read, and counts as 0. From time to time a meta judge reads some of the
judged responses and writes the next rubric:

    def refine(rubric, records) -> list of items

A record has the response's `prompt`, `completion`, `scores`, `reward`, `evaluation` and the other
columns of its row; an item is an `Item`, a text, or a mapping with `text` and perhaps `points`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.rewards.functions import Term, columns_of, described, expect_list, trial

Record = dict[str, Any]
Row = Mapping[str, Any]
Normalise = Literal["sum", "mean-of-fraction"]
Selector = Literal["uniform", "stratified", "screened"]
LABELS = ("good", "ok", "bad")  # of records, by how well they were scored


@dataclass(frozen=True)
class Item:
    """One criterion of a rubric, in words, and the most points that it gives."""

    text: str
    points: float = 5.0


@dataclass(frozen=True)
class Version:
    """A rubric and the step from which it was in force."""

    step: int
    rubric: tuple[Item, ...]


@dataclass(frozen=True)
class Scored:
    """What N responses are worth.

    Attributes:
        rewards: `[N]`.
        scores: for each response those of the rubric's items.
        evaluations: the judge's words.
        unread: how many items of each response the judge's words gave no number for.
    """

    rewards: list[float]
    scores: list[list[float]]
    evaluations: list[str]
    unread: list[int]


def items_of(given: Any, what: str) -> tuple[Item, ...]:
    """A rubric as it is written: a text, or a list of texts, mappings and items; without doubles.

    Raises:
        PostgradError: an entry is nothing of this.
    """
    several = [given] if isinstance(given, str) else given
    if not isinstance(several, list | tuple):
        raise PostgradError(f"{what} is {described(given)}: expected a list of items")
    return tuple(dict.fromkeys(_item(entry, what) for entry in several))


def _item(given: Any, what: str) -> Item:
    if isinstance(given, str):
        given = Item(given)
    elif isinstance(given, Mapping) and given.keys() <= {"text", "points"}:
        given = Item(given.get("text", ""), given.get("points", 5.0))
    if (
        not isinstance(given, Item)
        or not isinstance(given.text, str)
        or not given.text.strip()
        or isinstance(given.points, bool)
        or not isinstance(given.points, int | float)
        or not 0 < given.points < math.inf
    ):
        raise PostgradError(
            f"{what} has the item {described(given)}: expected a text, or a text and its points, "
            "more than 0"
        )
    return Item(given.text.strip(), float(given.points))


class EvolvingReward:
    """A judge with its rubric, the responses judged since the rubric's last change, and its past.

    The reward is the sum of the items' scores, or with `mean-of-fraction` the mean of each one's
    share of its points, whose scale stays when items are added.
    """

    def __init__(
        self,
        rubric: Sequence[Item],
        judge: Term,
        refine: Term,
        screen: Term | None = None,
        *,
        normalise: Normalise = "sum",
        most_unread: float = 0.5,
        time_limit: float = 60.0,
    ):
        if not rubric:
            raise PostgradError("rubric: expected at least one item, got none")
        self.versions = [Version(0, tuple(rubric))]
        self.records: list[Record] = []
        self._judge = judge
        self._refine = refine
        self._screen = screen
        self._normalise = normalise
        self._most_unread = most_unread
        self._time_limit = time_limit
        self._updated: int | None = None  # the step of the last call of `update`

    @property
    def rubric(self) -> tuple[Item, ...]:
        return self.versions[-1].rubric

    @property
    def version(self) -> int:
        """How often the rubric has changed."""
        return len(self.versions) - 1

    # Scoring ---------------------------------------------------------------------------------

    def score(self, rows: Sequence[Row], completions: Sequence[str]) -> Scored:
        """Judge completions `[N]` of the prompts of N rows by the present rubric.

        Raises:
            PostgradError: the judge raised, took too long, returned something else than numbers, or
                too few of its words could be read.
        """
        prompts = [row["prompt"] for row in rows]
        return self._scored(self.rubric, prompts, list(completions), columns_of(rows))

    def by_first_rubric(
        self, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> list[float]:
        """As a reward function: what the first rubric says, a yardstick that does not change."""
        return self._scored(self.versions[0].rubric, prompts, completions, columns).rewards

    def probe(self, row: Row) -> None:
        """Try the judge on one row, before any compute is spent."""
        self._scored(self.rubric, *trial(row))

    def _scored(
        self,
        rubric: tuple[Item, ...],
        prompts: list[Any],
        completions: list[str],
        columns: Mapping[str, list[Any]],
    ) -> Scored:
        available = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "rubric": list(rubric),
        }
        what = self._judge.title
        returned = self._judge.call(available, self._time_limit)
        judged = expect_list(returned, len(completions), what, "lists of scores")
        read = [_read(said, len(rubric), f"{what}, completion {i + 1}:")
                for i, said in enumerate(judged)]  # fmt: skip
        scores = [[0.0 if score is None else score for score in several] for several, _ in read]
        unread = [several.count(None) for several, _ in read]
        share = sum(unread) / (len(rubric) * len(unread))
        if share > self._most_unread:
            raise PostgradError(
                f"{what}: {share:.0%} of its scores could not be read, more than "
                f"most_unread={self._most_unread:g}"
            )
        rewards = [self._total(several, rubric) for several in scores]
        return Scored(rewards, scores, [words for _, words in read], unread)

    def _total(self, scores: Sequence[float], rubric: Sequence[Item]) -> float:
        if self._normalise == "sum":
            return math.fsum(scores)
        shares = [score / item.points for score, item in zip(scores, rubric, strict=True)]
        return math.fsum(shares) / len(shares)

    # Changing the rubric ---------------------------------------------------------------------

    def remember(self, rows: Sequence[Row], completions: Sequence[str], scored: Scored) -> None:
        """Keep judged responses for the meta judge."""
        for i, row in enumerate(rows):
            self.records.append(
                {
                    **row,
                    "completion": completions[i],
                    "scores": scored.scores[i],
                    "reward": scored.rewards[i],
                    "evaluation": scored.evaluations[i],
                }
            )

    def update(self, step: int, count: int, selector: Selector, generator: torch.Generator) -> bool:
        """Let the meta judge rewrite the rubric after `count` of the records; then forget them.

        The present rubric stays if none of the records is chosen or if the new one is empty. Says
        whether the rubric changed. A second call at the same step does nothing.
        """
        if self._updated == step:
            return False
        chosen = [self.records[i] for i in self._chosen(count, selector, generator)]
        rubric = self._refined(chosen) if chosen else ()
        self._updated = step
        self.records = []
        if not rubric or rubric == self.rubric:
            return False
        self.versions.append(Version(step, rubric))
        return True

    def _refined(self, records: list[Record]) -> tuple[Item, ...]:
        available: dict[str, list[Any]] = {"rubric": list(self.rubric), "records": records}
        given = self._refine.call(available, self._time_limit)
        return items_of(given, f"what {self._refine.title} returned")

    def _chosen(self, count: int, selector: Selector, generator: torch.Generator) -> list[int]:
        if selector == "uniform":
            return uniform(len(self.records), count, generator)
        if selector == "stratified":
            return stratified([record["reward"] for record in self.records], count, generator)
        assert self._screen is not None
        what = self._screen.title
        available: dict[str, list[Any]] = {"rubric": list(self.rubric), "records": self.records}
        returned = self._screen.call(available, self._time_limit)
        labels = expect_list(returned, len(self.records), what, "labels")
        odd = next((label for label in labels if label not in LABELS), None)
        if odd is not None:
            raise PostgradError(f"{what} returned {described(odd)}: expected good, ok or bad")
        return screened(labels, count)

    # State -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "versions": self.history(),
            "records": self.records,
            "updated": self._updated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.versions = [
            Version(version["step"], items_of(version["rubric"], "the saved rubric"))
            for version in state["versions"]
        ]
        self.records = list(state["records"])
        self._updated = state["updated"]

    def history(self) -> list[dict[str, Any]]:
        """Every rubric so far with its first step, as plain data."""
        return [
            {"step": version.step, "rubric": [asdict(item) for item in version.rubric]}
            for version in self.versions
        ]


def _read(said: Any, count: int, what: str) -> tuple[list[float | None], str]:
    """The scores and the words of what the judge said of one completion."""
    words = ""
    if isinstance(said, Mapping):
        said, words = said.get("scores"), str(said.get("evaluation", ""))
    if not isinstance(said, list | tuple) or len(said) != count:
        raise PostgradError(f"{what} got {described(said)}, expected {count} scores, one an item")
    for score in said:
        number = isinstance(score, int | float) and math.isfinite(score)
        if score is not None and not number:
            raise PostgradError(f"{what} got the score {described(score)}, expected a number")
    return [None if score is None else float(score) for score in said], words


# Which records the meta judge reads ----------------------------------------------------------


def uniform(records: int, count: int, generator: torch.Generator) -> list[int]:
    """At most `count` of so many records, each as likely as the others; in their order."""
    return sorted(torch.randperm(records, generator=generator)[:count].tolist())


def stratified(rewards: Sequence[float], count: int, generator: torch.Generator) -> list[int]:
    """At most `count` records, evenly from the lowest, the middle and the highest third.

    Thirds are cut as evenly as may be, larger ones first; with fewer than three records all are
    taken.
    """
    if len(rewards) < 3:
        return list(range(len(rewards)))
    order = torch.tensor(rewards, dtype=torch.float64).argsort(stable=True)
    chosen: list[int] = []
    for part, share in zip(order.tensor_split(3), shares_of(count, 3), strict=True):
        drawn: Tensor = part[torch.randperm(len(part), generator=generator)[:share]]
        chosen += drawn.tolist()
    return chosen


def shares_of(count: int, parts: int) -> list[int]:
    """`count` in so many whole parts, as evenly as may be, larger ones first."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def screened(labels: Sequence[str], count: int) -> list[int]:
    """At most `count` records: those labelled bad, then those labelled ok; none that are good."""
    worst_first = [i for wanted in ("bad", "ok") for i, x in enumerate(labels) if x == wanted]
    return worst_first[:count]
