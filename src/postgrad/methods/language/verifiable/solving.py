"""What the methods share that treat a prompt by how many of its responses solve it."""

from typing import Any, Unpack

from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import unknown
from postgrad.methods.base import Place
from postgrad.methods.language.base import Given
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)


class SolvingSettings(RewardedPolicyGradientSettings):
    """Settings of the methods that ask which responses are right."""

    accuracy: str | None = setting(
        None, "the reward term that says whether a response is right; empty: the whole reward"
    )
    success: float = setting(1.0, "a response is right from this value on", gt=0)


class SolvingPolicyGradient(PolicyGradient):
    """Policy gradient that knows which responses are right."""

    config: SolvingSettings

    def __init__(
        self, config: SolvingSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        super().__init__(config, place, reward=reward, **given)
        terms = [term.name for term in self.reward.functions.terms]
        if config.accuracy is not None and config.accuracy not in terms:
            raise unknown("reward term of accuracy", config.accuracy, terms)

    def solved(self, batch: Batch) -> Tensor:
        """Which of N responses are right, `[N]`."""
        name = self.config.accuracy
        values: Tensor = batch.reward if name is None else batch.fields()[f"reward/{name}"]
        return values >= self.config.success - 1e-6
