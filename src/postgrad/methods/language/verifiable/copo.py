"""COPO: Consistency-Aware Policy Optimization."""

import math

from torch import Tensor

from postgrad.advantages.consistency import (
    BlendMode,
    answer_entropy,
    consistency,
    entropy_gate,
    global_advantage,
    local_weight,
)
from postgrad.advantages.group import group_standardised
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.parts.base import (
    Advantage,
    Around,
    group_means,
    require_groups,
)
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.models.scoring import TokenScores
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.rewards.verifiers import AnswerKind, final_answer

_MIDDLE = 1.5 / math.log2(6)  # the paper's b in its groups of 6, as a share of the largest entropy


class ConsistencySettings(Settings):
    mode: BlendMode = setting(
        "only-soft", "who decides between local and global advantage", source="paper"
    )
    answer: AnswerKind = setting(
        "number", "a response's final answer: its number, the text in <answer> tags, or all of it"
    )
    k: float = setting(20.0, "steepness of the gate", gt=0, source="reported best")
    b: float | None = setting(
        None,
        "entropy in bits at which the gate is half open; if empty, 0.58 log2(samples), which is "
        "1.5 for 6 samples",
        source="reported best",
    )
    structured: bool = setting(
        False, "a prompt's reward falls with the entropy of its answers", source="official code"
    )
    global_coefficient: float = setting(
        1.0, "factor of the global part's weight", ge=0, source="official code"
    )
    eps: float = setting(1e-6, "added to deviations", ge=0, source="official code")


class Consistency(Advantage):
    """within the group where answers differ, of the whole group to other prompts' where they agree

    On the samples' own policy this one advantage is COPO; where the policy has moved, COPO clips
    the two losses each by itself.
    """

    Config = ConsistencySettings

    def __init__(self, config: ConsistencySettings, around: Around):
        super().__init__(config, around)
        require_groups(around, "agreement of answers")
        if around.prompts < 2:
            raise PostgradError(
                "batch_size: prompts are compared with each other, so expected at least 2, got "
                f"{around.prompts}"
            )
        self._metrics: Metrics = {}

    def blended(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Local advantages, global ones, and the weight of each, all `[N]`."""
        config = self.config
        local = group_standardised(batch.reward, batch.group, eps=config.eps)
        answers = [final_answer(text, config.answer) for text in batch.texts]
        entropy = answer_entropy(answers, batch.group)
        means, index = group_means(batch.reward, batch.group)
        if config.structured:
            means = means * consistency(entropy, self.around.samples)
        between = global_advantage(means, config.eps)[index]
        middle = _MIDDLE * math.log2(self.around.samples) if config.b is None else config.b
        gate = entropy_gate(entropy, config.k, middle)[index]
        weight = local_weight(config.mode, gate, local, batch.reward)
        rest = (1 - weight) * config.global_coefficient
        used = (weight * local).abs() + (rest * between).abs()
        self._metrics = {
            "answers/entropy": float(entropy.mean()),
            "advantage/local_weight": float(weight.mean()),
            "advantage/used": float((used > 1e-3).float().mean()),
        }
        return local, between, weight, rest

    def __call__(self, batch: Batch) -> Tensor:
        local, between, weight, rest = self.blended(batch)
        return weight * local + rest * between

    def describe(self) -> Metrics:
        return self._metrics


class COPOSettings(RewardedPolicyGradientSettings):
    rollout: RolloutSettings = setting(RolloutSettings(samples=6), "how the policy is sampled")
    mask: MaskChoice = setting(
        {"name": "ppo", "dual_clip": 3.0}, "which tokens teach", source="official code"
    )
    advantage: AdvantageChoice = setting("copo", "from rewards to advantages", source="paper")
    aggregation: Aggregation = setting(
        "sequence-mean", "how token losses become one", source="official scripts"
    )


class COPO(PolicyGradient):
    """COPO: Consistency-Aware Policy Optimization (Han et al. 2025, arXiv:2508.04138).

    Where all responses to a prompt are right, or all wrong, GRPO's advantage is zero and the
    samples are lost. COPO also compares prompts with each other: a prompt whose responses all agree
    is pushed up or down as a whole, by its mean reward R_j against the batch's. The entropy H_j in
    bits of the final answers to the prompt decides between the two:

        A^loc_{j,i} = (r_{j,i} - mean_i r_j) / (std_i r_j + 1e-6)
        A^glob_j    = (R_j - mean_j R) / (std_j R + 1e-6)
        w_j         = sigmoid(k (H_j - b))
        loss_t      = w_j clip_loss_t(A^loc) + (1 - w_j) clip_loss_t(A^glob)

    with PPO's clip of both losses, dual for negative advantages. The released code has more modes;
    the formula is `only-soft`. There, wrong answers that differ still teach nothing, as the gate is
    open and A^loc zero; `soft-with-forced` gives such groups to the global part (which of the two
    made the paper's numbers is uncertain). Final answers are equal if their numbers are
    (`advantage.answer`); the code compares them as strings. Responses without one count as one
    answer. Another `advantage` in the place of COPO's is used alone. The paper made 16 updates of
    each batch (`minibatches`).
    """

    Config = COPOSettings
    config: COPOSettings

    def selected(self, batch: Batch) -> Batch:
        """With both advantages, taken once over all prompts of the batch, as they are blended."""
        batch = super().selected(batch)
        part = self.estimator.advantage
        if not isinstance(part, Consistency):
            return batch
        local, between, weight, rest = part.blended(batch)
        return batch.with_fields(
            local_advantages=local,
            global_advantages=between,
            local_weight=weight,
            global_weight=rest,
        )

    def token_losses(self, batch: Batch, scores: TokenScores) -> tuple[Tensor, Metrics]:
        if "local_weight" not in batch:
            return super().token_losses(batch, scores)

        def column(values: Tensor) -> Tensor:
            return values.to(scores.logprobs)[:, None]

        local, metrics = self.estimator.token_losses(batch, scores, batch.local_advantages)
        between, _ = self.estimator.token_losses(batch, scores, batch.global_advantages)
        losses = column(batch.local_weight) * local + column(batch.global_weight) * between
        return losses, metrics
