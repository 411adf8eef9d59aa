"""Reference denominators: what the policy's probability of a token is divided by."""

import torch
from torch import Tensor

from postgrad.methods.language.parts.base import Denominator


class Sampler(Denominator):
    """the policy that sampled: importance sampling"""

    def __call__(self, logprobs: Tensor, old: Tensor) -> Tensor:
        return old


class Policy(Denominator):
    """the policy itself, as a constant: REINFORCE, the weight of every token is 1"""

    def __call__(self, logprobs: Tensor, old: Tensor) -> Tensor:
        return logprobs.detach()


class One(Denominator):
    """1: for samples of a source whose probabilities are unknown"""

    def __call__(self, logprobs: Tensor, old: Tensor) -> Tensor:
        return torch.zeros_like(logprobs)
