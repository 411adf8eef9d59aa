"""The program that samples and the one that trains disagree: by how much, and what mends it.

An engine with kernels and roundings of its own draws from q where the trainer computes pi, by the
same weights. What is learnt from its samples is then learnt off-policy, however fresh they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def truncated_weights(trainer: Tensor, sampler: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(cap, pi / q) of each token `[N, T]`, a constant; 1 where `mask` `[N, T]` is False.

    Truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"; Ionides 2008). `trainer` and `sampler` are log pi and log q `[N, T]`.
    """
    difference = torch.where(mask, trainer.detach() - sampler, 0.0)
    return difference.exp().clamp(max=cap)


@dataclass(frozen=True)
class Mismatch:
    """What `mismatch` sums over tokens drawn from q; sums of parts add up to those of the whole.

    Attributes:
        tokens: how many.
        absolute: of |d|, with d = log pi - log q.
        largest: the largest |d|.
        divergence: of exp(d) - 1 - d, whose mean under q is KL(q || pi).
        ratio: of exp(d).
        squared_ratio: of exp(2 d).
        capped: how many exp(d) are above the cap.
    """

    tokens: int = 0
    absolute: float = 0.0
    largest: float = 0.0
    divergence: float = 0.0
    ratio: float = 0.0
    squared_ratio: float = 0.0
    capped: int = 0

    def __add__(self, other: "Mismatch") -> "Mismatch":
        return Mismatch(
            self.tokens + other.tokens,
            self.absolute + other.absolute,
            max(self.largest, other.largest),
            self.divergence + other.divergence,
            self.ratio + other.ratio,
            self.squared_ratio + other.squared_ratio,
            self.capped + other.capped,
        )

    def metrics(self) -> dict[str, float]:
        """Means over tokens; none without tokens.

        `effective_samples` is Kish's (sum w)^2 / (n sum w^2) of the ratios w, at most 1: the share
        of the samples that as many of the trainer's own would be worth.
        """
        if not self.tokens:
            return {}
        return {
            "logprob_difference": self.absolute / self.tokens,
            "logprob_difference_largest": self.largest,
            "kl": self.divergence / self.tokens,
            "effective_samples": self.ratio**2 / (self.tokens * self.squared_ratio),
            "capped": self.capped / self.tokens,
        }


def mismatch(trainer: Tensor, sampler: Tensor, mask: Tensor, cap: float) -> Mismatch:
    """The sums over the tokens of `mask`, all `[N, T]`."""
    difference = (trainer.detach() - sampler)[mask].double()
    if not len(difference):
        return Mismatch()
    ratio = difference.exp()
    return Mismatch(
        len(difference),
        float(difference.abs().sum()),
        float(difference.abs().max()),
        float((torch.expm1(difference) - difference).sum()),
        float(ratio.sum()),
        float(ratio.square().sum()),
        int((ratio > cap).sum()),
    )
