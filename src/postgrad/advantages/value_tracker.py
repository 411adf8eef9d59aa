"""What each prompt of a fixed pool is worth, tracked from one response at a time."""

import math

import torch
from torch import Tensor


class BetaValueTracker:
    """Success rates of prompts, each a Beta distribution that forgets (SPO, arXiv 2509.13232).

    A prompt's value is v = alpha / (alpha + beta). An observation r in [0, 1] makes
    alpha <- rho alpha + r and beta <- rho beta + 1 - r, that is v <- v + (r - v) / (rho N + 1) with
    N = alpha + beta, which tends to 1 / (1 - rho). At first alpha = beta = 1/2.
    """

    def __init__(self, prompts: int):
        if prompts < 1:
            raise ValueError(f"there must be at least one prompt, got {prompts}")
        self.alpha = torch.full((prompts,), 0.5, dtype=torch.float64)
        self.beta = self.alpha.clone()

    def start(self, successes: Tensor, samples: int, weight: float) -> None:
        """Begin from the `successes` `[P]` among so many `samples` of every prompt.

        They count as `weight` observations, alpha = weight (k + 1/2) / (n + 1): an estimate of an
        earlier policy may weigh less than its samples.
        """
        if successes.shape != self.alpha.shape:
            raise ValueError(f"successes must be [{len(self.alpha)}], got {list(successes.shape)}")
        if samples < 1 or not weight > 0:
            raise ValueError(f"samples and weight must be above 0, got {samples} and {weight}")
        if bool(((successes < 0) | (successes > samples)).any()):
            raise ValueError(f"successes must lie between 0 and the {samples} samples")
        self.alpha = weight * (successes.double() + 0.5) / (samples + 1)
        self.beta = weight - self.alpha

    def values(self, prompts: Tensor | None = None) -> Tensor:
        """v float64, of the prompts `[n]` or of all."""
        values = self.alpha / (self.alpha + self.beta)
        return values if prompts is None else values[prompts]

    def sizes(self, prompts: Tensor | None = None) -> Tensor:
        """N = alpha + beta float64: how many observations the values stand on."""
        sizes = self.alpha + self.beta
        return sizes if prompts is None else sizes[prompts]

    @torch.no_grad()
    def update(self, prompts: Tensor, rewards: Tensor, keep: Tensor) -> None:
        """Take in rewards `[n]` of the prompts `[n]`, of whose past a share `keep` `[n]` counts on.

        A prompt that occurs several times forgets once, by the least of its shares.
        """
        if prompts.ndim != 1 or not prompts.shape == rewards.shape == keep.shape:
            raise ValueError(
                f"prompts, rewards and keep must all be [n], got {list(prompts.shape)}, "
                f"{list(rewards.shape)} and {list(keep.shape)}"
            )
        if bool(((rewards < 0) | (rewards > 1) | rewards.isnan()).any()):
            raise ValueError("rewards must lie between 0 and 1: they count as successes")
        if bool(((keep < 0) | (keep > 1) | keep.isnan()).any()):
            raise ValueError("the shares that are kept must lie between 0 and 1")
        seen, index = prompts.unique(return_inverse=True)
        rewards, share = rewards.double(), torch.ones(len(seen), dtype=torch.float64)
        share = share.scatter_reduce(0, index, keep.double(), "amin")
        self.alpha[seen] *= share
        self.beta[seen] *= share
        self.alpha.index_add_(0, prompts, rewards)
        self.beta.index_add_(0, prompts, 1 - rewards)

    def state_dict(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha, "beta": self.beta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.alpha, self.beta = state["alpha"].clone(), state["beta"].clone()


def policy_shift(before: Tensor, now: Tensor, mask: Tensor) -> Tensor:
    """The mean |log pi_before - log pi_now| of a response's tokens `[N]`: how far a policy moved.

    Log-probabilities and `mask` are `[N, T]`; a response without tokens has 0.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool or not mask.shape == before.shape == now.shape:
        raise ValueError(
            f"expected [N, T] and a boolean mask, got {list(before.shape)}, {list(now.shape)} and "
            f"a mask {list(mask.shape)} of {mask.dtype}"
        )
    gaps = torch.where(mask, before - now, 0.0).abs()
    return gaps.sum(1) / mask.sum(1).clamp(min=1)


def kept_share(shift: Tensor, low: float, high: float, half_life: float) -> Tensor:
    """rho = 2^(-D / half_life), within [low, high], of policy shifts D `[N]` (2509.13232)."""
    if not 0 < low < high < 1:
        raise ValueError(f"expected 0 < low < high < 1, got {low} and {high}")
    if not half_life > 0:
        raise ValueError(f"half_life must be above 0, got {half_life}")
    if bool((shift < 0).any()):
        raise ValueError("shifts must be at least 0")
    return torch.exp(-math.log(2) * shift / half_life).clamp(low, high)
