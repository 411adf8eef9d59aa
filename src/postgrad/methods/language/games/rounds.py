"""What the iterative methods share: a step of the loop is a round of several optimiser steps."""

from typing import Any

from postgrad.config import setting
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.online import OnlinePreference, OnlineSettings

# a round has one learning rate, so a warm-up over steps would be one over whole rounds
ROUNDS: dict[str, Any] = {
    **OnlinePreference.recipe,
    "learning_rate": 5e-7,
    "warmup_steps": 0,
    "steps": 10,
}


class RoundSettings(OnlineSettings):
    """Settings of the methods that sample, have compared, and learn for several optimiser steps."""

    batch_size: int = setting(64, "prompts a round", gt=0)
    rollout: RolloutSettings = setting(RolloutSettings(samples=8), "how the policy is sampled")
    minibatches: int = setting(8, "optimiser steps a pass over the samples of a round", gt=0)
