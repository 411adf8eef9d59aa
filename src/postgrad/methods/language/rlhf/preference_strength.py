"""What is done with pairs whose preference is weak or wrong, and how well noise was found."""

from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.errors import PostgradError, unknown
from postgrad.evaluation.statistics import separation
from postgrad.methods.base import Metrics
from postgrad.objectives.reward_modeling import weakest
from postgrad.tasks import Examples

REMEDIES = ("flip", "drop", "soft", "margin")
_DECILES = 10


def parse_remedies(text: str) -> tuple[str, ...]:
    """The remedies in `flip+margin`; none of them in `none`."""
    names = () if text == "none" else tuple(text.split("+"))
    for name in names:
        if name not in REMEDIES:
            raise unknown("remedy of strength", name, ("none", *REMEDIES))
    if len(set(names)) < len(names) or {"flip", "drop"} <= set(names):
        raise ValueError(f"strength: each once, and either flip or drop, got {text}")
    return names


def known_strength(data: Examples) -> Tensor | None:
    """The column `strength` `[M]` of the data, if there is one."""
    if "strength" not in data.columns:
        return None
    values = torch.empty(len(data))
    for number, row in enumerate(data.rows):
        try:
            values[number] = float(row["strength"])
        except (TypeError, ValueError):
            values[number] = torch.nan
        if not values[number].isfinite():
            raise PostgradError(
                f"{data.where(number)}: column 'strength' holds {row['strength']!r}, expected a "
                "finite number"
            )
    return values


@dataclass(frozen=True)
class Treatment:
    """How M pairs are trained on: which are kept `[n]`, and what `bradley_terry` is told `[M]`."""

    kept: Tensor
    flip: Tensor
    smoothing: Tensor
    margin: Tensor


def untreated(count: int, smoothing: float) -> Treatment:
    """All pairs as they are, with one constant of label smoothing."""
    none = torch.zeros(count)
    return Treatment(torch.arange(count), none.bool(), none + smoothing, none)


def treated(
    strength: Tensor, remedies: tuple[str, ...], share: float, smoothing: float
) -> Treatment:
    """The remedies for pairs of strength mu `[M]`, besides a constant of label smoothing.

    `flip` turns the share of pairs with the least mu round, `drop` leaves them out; `soft` takes
    p = sigma(-mu) for the probability that a label is wrong, `margin` m = mu for the margin. A
    flipped pair has the strength -mu, and the margin |mu|; no other margin is below 0.
    """
    plain = untreated(len(strength), smoothing)
    kept, flip, labels, margin = plain.kept, plain.flip, plain.smoothing, plain.margin
    weak = weakest(strength, share)
    if "flip" in remedies:
        flip = weak
    elif "drop" in remedies:
        kept = (~weak).nonzero().squeeze(1)
    if "soft" in remedies:
        labels = torch.sigmoid(torch.where(flip, strength, -strength))
    if "margin" in remedies:
        margin = torch.where(flip, strength.abs(), strength.clamp(min=0))
    return Treatment(kept, flip, labels, margin)


def strength_metrics(strength: Tensor, deviation: Tensor, examples: Examples) -> Metrics:
    """Mean mu of each tenth of the pairs; where flips were put in, how well mu finds them.

    `detection` is the probability that a flipped pair has less strength than another (AUC).
    """
    order = strength.argsort(stable=True)
    metrics = {
        "strength/mean": float(strength.mean()),
        "strength/deviation": float(deviation.mean()),
        "strength/negative": float((strength < 0).float().mean()),
    }
    flipped = torch.tensor([bool(row.get("flipped")) for row in examples.rows])
    known = bool(flipped.any()) and not bool(flipped.all())
    if known:
        metrics["strength/detection"] = separation(
            (-strength[flipped]).tolist(), (-strength[~flipped]).tolist()
        )
    for number, part in enumerate(order.tensor_split(_DECILES), start=1):
        if len(part):
            metrics[f"strength/decile_{number}"] = float(strength[part].mean())
            if known:
                right = float((~flipped[part]).float().mean())
                metrics[f"strength/right_in_decile_{number}"] = right
    return metrics
