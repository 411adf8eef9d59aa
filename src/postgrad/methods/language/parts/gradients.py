"""Likelihood gradients: the function of the policy's probabilities that is followed."""

from torch import Tensor

from postgrad.config import Settings, setting
from postgrad.methods.language.parts.base import Gradient
from postgrad.objectives import estimator


class Token(Gradient):
    """each token's probability"""

    def __call__(self, log_weight: Tensor, mask: Tensor) -> Tensor:
        return estimator.token_weight(log_weight, mask)


class Sequence(Gradient):
    """the geometric mean of the response's probabilities, the same for all of its tokens (GSPO)"""

    whole_responses = True

    def __call__(self, log_weight: Tensor, mask: Tensor) -> Tensor:
        return estimator.sequence_weight(log_weight, mask)


class Shape(Settings):
    gamma: float = setting(0.1, "where the weight of a token is greatest", gt=0, source="LUFFY")


class Shaped(Gradient):
    """f(p) = p / (p + gamma) of each token's probability p, so that unlikely tokens count too"""

    Config = Shape
    denominators = ("one",)

    def __call__(self, log_weight: Tensor, mask: Tensor) -> Tensor:
        return estimator.shaped_weight(log_weight, mask, self.config.gamma)
