"""Advantages from the rewards of responses, and the baselines that they are measured from."""

from typing import Any, Literal

from torch import Tensor

from postgrad.advantages.group import (
    batch_standardised,
    group_mean_centred,
    group_standardised,
    leave_one_out,
    lite,
)
from postgrad.advantages.running_means import MovingMean
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.methods.language.parts.base import Advantage, Around, require_groups


class Reward(Advantage):
    """the reward itself; with rewards of 0 and 1, online rejection fine-tuning"""

    def __call__(self, batch: Batch) -> Tensor:
        return batch.reward


class Centred(Advantage):
    """reward minus its group's mean (Dr. GRPO)"""

    def __init__(self, config: Settings, around: Around):
        super().__init__(config, around)
        require_groups(around, "a group's mean")

    def __call__(self, batch: Batch) -> Tensor:
        return group_mean_centred(batch.reward, batch.group)


class Deviation(Settings):
    std: Literal["sample", "population"] = setting("sample", "deviation over n - 1, or n")
    eps: float = setting(1e-4, "added to the deviation", ge=0, source="TRL")


class Standardised(Advantage):
    """reward minus its group's mean, over the group's standard deviation (GRPO)"""

    Config = Deviation

    def __init__(self, config: Deviation, around: Around):
        super().__init__(config, around)
        require_groups(around, "a group-normalised advantage")

    def __call__(self, batch: Batch) -> Tensor:
        return group_standardised(batch.reward, batch.group, self.config.std, self.config.eps)


class LeaveOneOut(Advantage):
    """reward minus the mean of the prompt's other responses (RLOO)"""

    def __init__(self, config: Settings, around: Around):
        super().__init__(config, around)
        require_groups(around, "a leave-one-out baseline")

    def __call__(self, batch: Batch) -> Tensor:
        return leave_one_out(batch.reward, batch.group)


class BatchStandardised(Advantage):
    """reward minus the batch's mean, over the batch's standard deviation (REINFORCE++)"""

    def __call__(self, batch: Batch) -> Tensor:
        return batch_standardised(batch.reward, eps=1e-6)


class LiteSettings(Settings):
    eps: float = setting(1e-6, "added to the deviation", ge=0, source="official code")


class Lite(Advantage):
    """reward minus its group's mean, over the whole batch's standard deviation (Lite PPO)"""

    Config = LiteSettings

    def __init__(self, config: LiteSettings, around: Around):
        super().__init__(config, around)
        require_groups(around, "a group's mean")

    def __call__(self, batch: Batch) -> Tensor:
        return lite(batch.reward, batch.group, eps=self.config.eps)


class Window(Settings):
    window: int = setting(1024, "rewards in the moving mean", gt=0)


class MovingBaseline(Advantage):
    """reward minus the mean of the last rewards of any prompt (REINFORCE with a baseline)"""

    Config = Window

    def __init__(self, config: Window, around: Around):
        super().__init__(config, around)
        self._recent = MovingMean(config.window)

    def __call__(self, batch: Batch) -> Tensor:
        baseline = self._recent.value  # of earlier steps: it may not depend on these samples
        self._recent.update(batch.reward)
        return batch.reward - baseline

    def state_dict(self) -> dict[str, Any]:
        return self._recent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent.load_state_dict(state)
