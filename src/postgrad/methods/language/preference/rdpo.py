"""Provably Robust DPO."""

import torch
from pydantic import field_validator
from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.pairwise import robust


class RobustDPOSettings(PreferenceSettings):
    """rDPO's settings."""

    flip_rate: float = setting(
        0.1,
        "assumed probability that a label is flipped, in [0, 0.5)",
        source="TRL, quoting the paper",
    )
    largest_margin: float | None = setting(
        None, "cap on |beta Delta|, since the loss is unbounded below", gt=0
    )

    @field_validator("flip_rate")
    @classmethod
    def _correctable(cls, value: float) -> float:
        if not 0 <= value < 0.5:
            raise ValueError(
                "flip_rate: must lie in [0, 0.5), where the denominator 1 - 2 flip_rate of the "
                f"correction is positive (at 0.5 labels say nothing), got {value}"
            )
        return value


class RobustDPO(PreferenceMethod):
    """Provably Robust DPO (Ray Chowdhury, Kini, Natarajan 2024, arXiv:2403.00409).

    Labels that are flipped with a known probability eps < 1/2 bias DPO's loss. The classical
    correction for label noise makes it unbiased: averaged over flips it is the clean loss.

        h = beta Delta (of the observed order),   l(h) = -log sigma(h)
        L = [(1 - eps) l(h) - eps l(-h)] / (1 - 2 eps)  =  l(h) - h eps/(1 - 2 eps)

    So rDPO is DPO with a constant push towards the observed order, where cDPO pushes against it.
    The loss is linear in h and unbounded below: a negative loss is no error, and on separable data
    only early stopping or `largest_margin` bounds it (not in the paper). Overestimating eps is
    worse than underestimating it. Equations from the paper, checked against TRL's `robust` loss;
    no official code is known.
    """

    Config = RobustDPOSettings
    config: RobustDPOSettings

    def losses(self, found: Compared) -> Tensor:
        h = self.config.beta * found.delta
        if self.config.largest_margin is not None:
            h = torch.clamp(h, -self.config.largest_margin, self.config.largest_margin)
        return robust(h, self.config.flip_rate)
