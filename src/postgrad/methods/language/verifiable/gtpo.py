"""GTPO: Trajectory-Based Policy Optimization."""

from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.conflicts import (
    ONE_BIT,
    conflict_masks,
    conflict_weights,
    entropy_filter,
    longest_run,
    response_entropy,
)
from postgrad.advantages.group import group_mean_centred
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.methods.language.base import pad
from postgrad.methods.language.parts.base import (
    Advantage,
    Around,
    require_groups,
    require_one_update,
)
from postgrad.methods.language.parts.choices import (
    AdvantageChoice,
    DenominatorChoice,
    MaskChoice,
)
from postgrad.methods.language.parts.masks import Filtered, FilteredMask
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation


class EntropyShift(Settings):
    gamma: float = setting(0.1, "weight of the response's mean entropy", ge=0, source="code")


class LessEntropy(Advantage):
    """reward minus its group's mean, less gamma times the response's mean entropy (GTPO)"""

    Config = EntropyShift
    needs_entropies = True

    def __init__(self, config: EntropyShift, around: Around):
        super().__init__(config, around)
        require_groups(around, "a group's mean")
        self._shift = 0.0

    def __call__(self, batch: Batch) -> Tensor:
        shift = self.config.gamma * response_entropy(batch.entropies, batch.mask)
        self._shift = float(shift.mean())
        return group_mean_centred(batch.reward, batch.group) - shift

    def describe(self) -> dict[str, float]:
        return {"advantage/entropy_shift": self._shift}


class ConflictSettings(Filtered):
    conflicts: bool = setting(True, "weigh the tokens that good and bad responses share")
    stack_runs: bool = setting(
        False, "square the weight of tokens in both the opening and the ending (official code)"
    )
    per_conflict: bool = setting(
        False, "divide a response's weights by the length of its longer run (official code)"
    )
    entropy_threshold: float | None = setting(
        ONE_BIT,
        "leave out responses of a mean entropy above this; empty: none",
        gt=0,
        source="paper; official code 0.7",
    )
    compare_with_start: bool = setting(
        True,
        "no such filter if the initial policy's mean entropy is above it already; official code: "
        "always filter",
        source="paper",
    )


class Conflicts(FilteredMask):
    """no push down, and a double push up, on what good and bad responses share; none uncertain"""

    Config = ConflictSettings
    needs_entropies = True

    def __init__(self, config: ConflictSettings, around: Around):
        super().__init__(config, around)
        require_groups(around, "the search for shared tokens")
        require_one_update(around, "the mask of GTPO")
        self._initial: float | None = None
        self._metrics: dict[str, float] = {}

    def __call__(self, weight: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        return weight

    def prepared(self, batch: Batch) -> Batch:
        uncertain = torch.zeros(len(batch), dtype=torch.bool)
        if self.config.entropy_threshold is not None:
            entropy = response_entropy(batch.entropies, batch.mask)
            if self._initial is None and self.config.compare_with_start:
                self._initial = float(entropy.mean())
            uncertain = ~entropy_filter(entropy, self.config.entropy_threshold, self._initial)
        self._metrics = {"mask/uncertain": float(uncertain.float().mean())}
        batch = super().prepared(batch)
        if self.config.conflicts:
            batch = self._weighed(batch)
        return batch.with_fields(mask=batch.mask & ~uncertain[:, None])

    def _weighed(self, batch: Batch) -> Batch:
        """The weights of conflict tokens, found in all responses, those left out too."""
        ids = pad([response.cpu() for response in batch.responses])
        lengths = torch.tensor([len(response) for response in batch.responses])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        better = group_mean_centred(batch.reward, batch.group)  # than the group, or worse
        opening, ending = conflict_masks(ids, mask, better, batch.group)
        weights = conflict_weights(opening, ending, better, stack_runs=self.config.stack_runs)
        if self.config.per_conflict:
            weights = weights / longest_run(opening, ending)[:, None]
        self._metrics["mask/in_conflict"] = float((opening | ending)[mask].float().mean())
        return batch.with_fields(token_weights=weights)

    def describe(self) -> dict[str, float]:
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        return {"initial_entropy": self._initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._initial = state["initial_entropy"]


class GTPOSettings(RewardedPolicyGradientSettings):
    mask: MaskChoice = setting("gtpo", "which tokens teach", source="paper")
    denominator: DenominatorChoice = setting(
        "policy", "what its probability is divided by", source="paper: strictly on-policy"
    )
    advantage: AdvantageChoice = setting("gtpo", "from rewards to advantages", source="paper")
    aggregation: Aggregation = setting(
        "sequence-mean", "how token losses become one", source="paper"
    )


class GTPO(PolicyGradient):
    """GTPO: Trajectory-Based Policy Optimization (Simoni et al. 2025, arXiv:2508.03772).

    Responses that are rewarded and responses that are not often begin and end alike, with the tags
    of a format say, and GRPO pulls these tokens both ways. GTPO never pushes them down and pushes
    them up twice. Besides, learning from uncertain responses flattens the policy: those whose mean
    entropy <H>_i is above ln 2 are left out, and the advantage of the others falls with it. No KL
    to a reference is needed. With rewards r_1 … r_G of a group,

        A_i = r_i - mean(r) - gamma <H>_i
        L   = -mean_i delta_i A_i / |y_i| sum_t lambda_{i,t} rho_{i,t},    rho = pi / stopgrad(pi)

    delta_i = 1 if <H>_i ≤ ln 2, or if the initial policy's mean entropy was above ln 2, else 0;
    lambda = 2 at conflict tokens where r_i > mean(r), 0 where r_i < mean(r), and 1 at all others.
    Conflict tokens are the shared openings and endings (see `postgrad.advantages.conflicts`).

    The formula is the paper's; where the released code differs (a threshold of 0.7 for every model,
    weights of 4 where opening and ending meet, weights over the number of conflict tokens) there is
    a setting, except that the code adds responses up where the formula takes their mean. gamma
    <H>_i is a constant: no gradient flows through the entropy. Groups without a difference in
    reward still learn from it: all that was sampled goes down a little, as published. The scale of
    rewards is not divided out (the paper's runs have 10 for the format and 10 for the answer), so
    gamma and the learning rate belong to one scale. The initial policy's entropy is that of the
    first step's responses.
    """

    Config = GTPOSettings
    recipe = {
        "precision": "auto",
        "learning_rate": 1e-6,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "clip_norm": 0.1,
        "steps": 100,
    }
    config: GTPOSettings
