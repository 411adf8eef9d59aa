"""Running moments, and the reward scale that control methods share."""

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance of all vectors `[n, d]` seen, merged batch by batch (Chan et al., 1979).

    An estimator with buffers only: it moves with a network, and is saved with it.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in `values` `[n, d]`, n may be 0; the variance is that of the population."""
        if values.ndim != 2 or values.shape[1:] != self.mean.shape:
            raise ValueError(f"expected [n, {len(self.mean)}], got {list(values.shape)}")
        if not len(values):
            return
        values = values.to(torch.float64)
        total = self.count + len(values)
        share = len(values) / total
        shift = values.mean(0) - self.mean
        spread = (1 - share) * self.variance + share * values.var(0, correction=0)
        self.variance.copy_(spread + share * (1 - share) * shift.square())
        self.mean.add_(share * shift)
        self.count.copy_(total)


class RewardScale:
    """Divides rewards by the standard deviation of the running discounted return (VecNormalize).

    The mean is left alone: shifting rewards would change what is optimal. `clip` bounds the result.
    """

    def __init__(self, environments: int, discount: float, clip: float = 10.0):
        self._moments = RunningMoments(1)
        self._returns = torch.zeros(environments, dtype=torch.float64)
        self._discount = discount
        self._clip = clip

    @torch.no_grad()
    def __call__(self, rewards: Tensor, ends: Tensor) -> Tensor:
        """Scaled rewards `[T, B]`, after taking them in; `ends` `[T, B]` marks ends of episodes."""
        if rewards.ndim != 2 or rewards.shape != ends.shape:
            raise ValueError(f"expected [T, B], got {list(rewards.shape)} and {list(ends.shape)}")
        history = torch.empty(rewards.shape, dtype=torch.float64)
        for step in range(len(rewards)):
            self._returns = self._discount * self._returns + rewards[step]
            history[step] = self._returns
            self._returns = torch.where(ends[step], 0.0, self._returns)
        self._moments.update(history.reshape(-1, 1))
        scale = (self._moments.variance + 1e-8).rsqrt().to(rewards.dtype)
        return (rewards * scale).clamp(-self._clip, self._clip)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._moments.state_dict(), "returns": self._returns}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        moments = {name: value for name, value in state.items() if name != "returns"}
        self._moments.load_state_dict(moments)
        self._returns = state["returns"].clone()
