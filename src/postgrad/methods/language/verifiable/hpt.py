"""Hybrid Post-Training."""

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Place
from postgrad.methods.data import column_texts
from postgrad.methods.language.base import Given
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.rollouts import rollout_batch
from postgrad.methods.language.verifiable.solving import SolvingPolicyGradient, SolvingSettings
from postgrad.models.scoring import TokenScores
from postgrad.objectives.hybrid import Normalisation, hybrid
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.sampling.difficulty import of_groups, solve_counts
from postgrad.sampling.generation import Rollouts

_CODE = "official script"


class HPTSettings(SolvingSettings):
    """HPT's settings."""

    mask: MaskChoice = setting("none", "which tokens teach", source=_CODE)
    advantage: AdvantageChoice = setting("centred", "from rewards to advantages", source=_CODE)
    aggregation: Aggregation = setting(
        "sequence-sum-constant", "how token losses of rollouts become one", source=_CODE
    )
    entropy_coefficient: float = setting(0.001, "weight of the entropy bonus", ge=0, source=_CODE)
    gate: int = setting(
        0,
        "a prompt of which at most so many responses are right is learnt from its demonstration; "
        "-1: none is",
        ge=-1,
        source="official script for Qwen (Llama: 2)",
    )
    sft_coefficient: float = setting(
        1.0, "weight of the supervised loss", ge=0, source="official script (1.5B: 0.3)"
    )
    normalisation: Normalisation = setting(
        "prompts", "both terms as means over prompts, or as the official code adds them up"
    )
    solution_column: str = setting("solution", "the column of the demonstrations", min_length=1)


class HPT(SolvingPolicyGradient):
    """Hybrid Post-Training (Lv et al. 2025, arXiv:2509.04419).

    Where every response fails, a policy gradient learns nothing; where the policy can do without,
    imitation overwrites what it reasons by. So every prompt takes the one or the other, by how many
    of its n rollouts are right in this step:

        L(x)     = L_RL(x) if #right(x) > gate else c L_SFT(x)
        L_RL(x)  = 1/n sum_i 1/L_max sum_t -A_i pi(y_it) / pi_old(y_it),  A_i = r_i - mean(r)
        L_SFT(x) = -1/|y*| sum_t log pi(y*_t)

    and the loss is the mean of L(x) over the prompts. Both are instances of one estimator, the
    unified policy gradient: supervised fine-tuning is an advantage of 1 over the policy itself as
    denominator, on demonstrations instead of rollouts. There is no clip.

    Deviations: the mean over prompts is ours, so that the weight of a prompt does not depend on how
    the batch is cut; `normalisation=official` has the code's sums, over the whole batch instead of
    over a micro-batch. Demonstrations are scored at the sampling temperature. The ablations with
    demonstrations as off-policy samples, or with all signals in fixed shares, are left out.
    """

    Config = HPTSettings
    several_turns = False
    recipe = {**SolvingPolicyGradient.recipe, "learning_rate": 5e-6, "steps": 500}
    parts = FourParts(
        mask="none",
        denominator="rollouts: the policy that sampled; demonstrations: the policy itself",
        advantage="rollouts: reward minus its group's mean; demonstrations: 1",
        gradient="each token's probability",
    )
    config: HPTSettings

    def __init__(
        self, config: HPTSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        samples = config.rollout.samples
        if config.gate > samples:
            raise PostgradError(
                f"gate: at most rollout.samples, {samples}, responses can be right, "
                f"got {config.gate}"
            )
        super().__init__(config, place, reward=reward, **given)
        self._seen: Metrics = {}  # of the step's rollouts, before some of them leave the batch
        if config.gate < 0:
            return
        texts = column_texts(self.data, "solution_column", config.solution_column)
        self.demonstrations = [self.policy.encode_response(text) for text in texts]
        longest = config.rollout.max_new_tokens
        for number, tokens in enumerate(self.demonstrations):
            if len(tokens) > longest:
                raise PostgradError(
                    f"{self.data.where(number)}: the demonstration has {len(tokens)} tokens, more "
                    f"than rollout.max_new_tokens={longest}"
                )

    def learnable(self, batch: Batch) -> Batch:
        """Rollouts of the prompts that are above the gate, and demonstrations of the others."""
        rollouts = super().learnable(batch)
        right, _ = solve_counts(self.solved(rollouts), rollouts.group)
        shown = right <= self.config.gate
        self._seen = {
            **super().describe_batch(rollouts),
            "demonstrated": float(shown.float().mean()),
        }
        kept = rollouts.select(of_groups(~shown, rollouts.group))
        kept = kept.with_fields(demonstrated=torch.zeros(len(kept), dtype=torch.bool))
        if not bool(shown.any()):
            return kept
        failed = rollouts.select(of_groups(shown, rollouts.group))
        firsts = [failed.group.tolist().index(group) for group in failed.group.unique()]
        return kept.joined(self._shown(failed.select(torch.tensor(firsts))))

    def _shown(self, failed: Batch) -> Batch:
        """The demonstrations of the prompts of these rollouts, with all the fields of a batch."""
        responses = [self.demonstrations[row] for row in failed.row.tolist()]
        count = len(failed)
        one = torch.ones(count)
        demonstrations = Rollouts(
            prompts=failed.prompts,
            responses=responses,
            logprobs=[torch.zeros(len(response)) for response in responses],
            finished=one.bool(),
            texts=[self.policy.decode(response) for response in responses],
        )
        others = {
            name: torch.zeros_like(values) for name, values in failed.fields().items()
            if isinstance(values, Tensor)
        }  # fmt: skip
        made = rollout_batch(
            demonstrations, int(failed.step[0]), group=failed.group, reward=one, terms={},
            row=failed.row, advantages=torch.ones_like(failed.advantages),
        )  # fmt: skip
        return made.with_fields(
            **{name: v for name, v in others.items() if name not in made}, demonstrated=one.bool()
        )

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """With the counts by which the two terms are normalised, however the batch is cut."""
        for part in super().minibatches(batch):
            tokens = part.mask.sum(1)
            counts = {
                "prompt_count": len(part.group.unique()),
                "rollout_tokens": int(tokens[~part.demonstrated].sum()),
                "demonstration_tokens": int(tokens[part.demonstrated].sum()),
            }
            yield part.with_fields(
                **{name: torch.full((len(part),), count) for name, count in counts.items()}
            )

    def token_losses(self, batch: Batch, scores: TokenScores) -> tuple[Tensor, Metrics]:
        shown = batch.demonstrated.to(scores.mask)[:, None]
        if "old_logprobs" in batch:  # demonstrations were not sampled: their ratio is 1
            own = scores.logprobs.detach()
            old = batch.old_logprobs[:, : own.shape[1]].to(own)
            batch = batch.with_fields(old_logprobs=torch.where(shown, own, old))
        losses, metrics = super().token_losses(batch, scores)
        return torch.where(shown, -scores.logprobs, losses), metrics

    def divergence(self, batch: Batch, scores: TokenScores) -> Tensor:
        """That of rollouts alone: it is estimated by what the policy itself sampled."""
        shown = batch.demonstrated.to(scores.mask)[:, None]
        return torch.where(shown, 0.0, super().divergence(batch, scores))

    def aggregated(self, per_token: Tensor, batch: Batch, scores: TokenScores) -> Tensor:
        config = self.config
        return hybrid(
            per_token,
            batch.mask[:, : per_token.shape[1]].to(scores.mask) & scores.mask,
            batch.demonstrated.to(scores.mask),
            how=config.aggregation,
            prompts=int(batch.prompt_count[0]),
            samples=config.rollout.samples,
            longest=config.rollout.max_new_tokens,
            rollout_tokens=int(batch.rollout_tokens[0]),
            demonstration_tokens=int(batch.demonstration_tokens[0]),
            coefficient=config.sft_coefficient,
            normalisation=config.normalisation,
        )

    def describe_batch(self, batch: Batch) -> Metrics:
        return self._seen
