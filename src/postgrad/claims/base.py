"""What a claim is: a paper's point in miniature, as arms that differ in the method alone."""

from collections.abc import Callable
from dataclasses import dataclass, field

from postgrad.errors import PostgradError, unknown


@dataclass(frozen=True)
class Outcome:
    """One arm under one seed: its numbers, and curves as (x, y) points by name."""

    values: dict[str, float]
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One of the results of a study, decided as a claim is.

    The statement says that `metric` is higher (or lower) in the arm `method` than in `baseline`.
    """

    statement: str
    metric: str
    method: str
    baseline: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Claim:
    """The comparison that a paper stands on, small enough to rerun.

    `run(arm, seed, quick)` does the work of one arm under one seed; all arms get the same data,
    samples and tuning. `method` and `baseline` are the two arms whose `metric` decides. `quick`
    is the same code in seconds: it shows that everything works and decides nothing.

    A study has several results: one of them is the claim, the others its `findings`, each with a
    verdict of its own.
    """

    slug: str
    statement: str
    task: str
    metric: str
    higher_is_better: bool
    method: str
    baseline: str
    arms: tuple[str, ...]
    run: Callable[[str, int, bool], Outcome]
    notes: str = ""
    findings: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        compared = [(self.method, self.baseline)]
        compared += [(finding.method, finding.baseline) for finding in self.findings]
        for arm in (arm for sides in compared for arm in sides):
            if arm not in self.arms:
                raise ValueError(f"{arm!r} is not among the arms {self.arms}")


def load_claim(slug: str) -> Claim:
    """The claim of a method, from `postgrad/claims/SLUG.py`."""
    import importlib
    import pkgutil

    import postgrad.claims
    from postgrad.catalogue import entries

    module = slug.replace("-", "_")
    if module not in {found.name for found in pkgutil.iter_modules(postgrad.claims.__path__)}:
        if slug not in entries():
            raise unknown("method", slug, entries())
        raise PostgradError(f"{slug} has no claim to reproduce: `postgrad list --ready`")
    claim: Claim = importlib.import_module(f"postgrad.claims.{module}").CLAIM
    return claim
