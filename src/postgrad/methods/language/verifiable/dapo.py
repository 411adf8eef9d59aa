"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization."""

import torch

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import Metrics, NothingToLearn
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.sampling.selection import first_groups, informative_groups
from postgrad.seeding import generator


class DAPOSettings(RewardedPolicyGradientSettings):
    """DAPO's settings."""

    mask: MaskChoice = setting(
        {"name": "ppo", "clip_low": 0.2, "clip_high": 0.28},
        "which tokens teach, by how far the policy has moved",
        source="paper, §4.1",
    )
    advantage: AdvantageChoice = setting(
        "standardised", "from rewards to advantages", source="paper, eq. 9"
    )
    most_rounds: int = setting(
        4, "rounds of sampling until a batch of groups with a difference is full; 1: they are just "
        "left out", gt=0, source="official code: 10",
    )  # fmt: skip


class DAPO(PolicyGradient):
    """DAPO (Yu et al. 2025, arXiv:2503.14476): four changes to GRPO for long reasoning.

    Clip-higher (`mask.clip_high`) leaves room for unlikely tokens; dynamic sampling draws further
    prompts in place of groups whose rewards are all equal, until the batch is full; the loss is a
    mean over tokens, not over responses; and overlong responses are punished softly, by a reward
    beside the task's: `reward=[math-verify, {name: length, form: overlong, target: …, buffer: …}]`.

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)    of groups with a difference in r
        L   = sum_it max(-rho A, -clip(rho, 0.8, 1.28) A) / number of tokens

    There is no KL. Not "direct advantage policy optimisation", which is `dapo-direct-advantage`.
    Whether a group differs is asked of the whole reward; a soft punishment for length can make it
    differ where all answers are wrong.
    """

    Config = DAPOSettings
    config: DAPOSettings

    def sampled(self, index: list[int], step: int) -> Batch:
        kept: Batch | None = None
        drawn = 0
        for draw in range(self.config.most_rounds):
            here = index if draw == 0 else self._further(step, draw)
            batch = self.answered(here, step, "rollout", step, draw)
            drawn += len(batch)
            differs = informative_groups(batch.reward, batch.group)
            batch = batch.with_fields(group=batch.group + draw * len(index))
            batch = batch.select(differs.nonzero().squeeze(1))
            kept = batch if kept is None else kept.joined(batch)
            if len(kept.group.unique()) >= len(index):
                break
        if kept is None or not len(kept):
            raise NothingToLearn("all rewards of a prompt are equal, for every prompt of the step")
        self._left_out = 1 - len(kept) / drawn
        return kept.select(first_groups(kept.group, len(index)))

    def _further(self, step: int, draw: int) -> list[int]:
        """Rows for another round of a step."""
        order = torch.randperm(len(self.data), generator=generator(self.place.seed, step, draw))
        index: list[int] = order[: self.config.batch_size].tolist()
        return index

    def describe_batch(self, batch: Batch) -> Metrics:
        return {**super().describe_batch(batch), "reward/left_out": self._left_out}
