"""SFT by f-divergences in which the reference survives."""

import math
from typing import Literal, Self, Unpack

import torch
from pydantic import model_validator
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.language.base import Given, pad
from postgrad.methods.language.comparisons import SCORING_TOKENS
from postgrad.methods.language.supervised.sft import SFT, SFTSettings
from postgrad.objectives.pairwise import sequence_logprobs
from postgrad.objectives.supervised import (
    Divergence,
    demonstration_weight,
    f_divergence_sft,
    implicit_reward,
)
from postgrad.timing import timed

_FLOOR = -1 + 1e-3  # of rho + v in Hellinger's loss, which is infinite at -1


class ImplicitRewardSFTSettings(SFTSettings):
    """Settings of SFT by f-divergences."""

    divergence: Divergence = setting(
        "pearson", "tv (plain SFT), pearson or hellinger", source="chosen here"
    )
    level: Literal["sequence", "token"] = setting(
        "sequence",
        "implicit rewards of whole responses, or of tokens (for long ones)",
        source="chosen here",
    )
    beta: float = setting(
        0.1, "strength of the KL to the reference; about 1 for tokens", gt=0, source="chosen here"
    )
    value_rate: float = setting(
        0.0, "step size of one learned value v for all prompts; 0: v = 0", ge=0
    )

    @model_validator(mode="after")
    def _value_of_sequences(self) -> Self:
        if self.value_rate > 0 and self.level == "token":
            raise ValueError(
                f"value_rate: a learned value needs level=sequence, got {self.value_rate:g} with "
                "level=token, where v is 0"
            )
        return self


class ImplicitRewardSFT(SFT):
    """SFT by f-divergences, from implicit rewards (Wang et al. 2025, arXiv:2507.00018).

    SFT and DPO learn one implicit reward, rho = beta log pi/pi_ref, up to a value v. SFT as
    distribution matching, min D_f(pi || expert) + beta KL(pi || pi_ref), has the dual

        L = E_demonstrations [ f*(-rho - v) ] + v

    For total variation f*(t) = t: v cancels, the reference becomes a constant and nothing holds
    the policy near it. That is plain SFT, for which the paper recommends a smaller learning rate
    before DPO. In other divergences the reference stays:

        pearson:    L = -(rho + v) + (rho + v)^2/4 + v      weight of grad log pi: 1 - (rho + v)/2
        hellinger:  L = -(rho + v)/(1 + rho + v) + v        weight: 1/(1 + rho + v)^2

    so that a demonstration which the policy has already made likelier pulls less. The loss is
    divided by beta and, as in SFT, by the number of response tokens: every divergence has SFT's
    gradient at the reference, and learning rates compare. The reference is the initial policy.

    With v = 0 (the default) the value is dropped; `value_rate` learns one v for all prompts by
    gradient descent. At level=token rho is a token's, which leaves out values. Hellinger's rho + v
    is clamped just above -1; what lies below has no gradient and is counted (`clamped`). The
    equations are rebuilt from the abstract and the usual dual; which v, level and beta the authors
    use is not known (uncertain). No official code is known.
    """

    Config = ImplicitRewardSFTSettings
    # the paper's reduced rate; 2e-5 is usual (both uncertain)
    recipe = {**SFT.recipe, "learning_rate": 5e-6}
    config: ImplicitRewardSFTSettings

    def __init__(self, config: ImplicitRewardSFTSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place, **given)
        self.value = 0.0
        if config.divergence != "tv":
            self.policy.freeze_reference()

    def collect(self, step: int) -> Batch:
        batch = super().collect(step)
        if self.config.divergence == "tv":
            return batch
        with timed("scoring"), self.policy.reference():
            known = [
                row.cpu()
                for part in batch.split(SCORING_TOKENS)
                for row in self.policy.score(part.prompts, part.responses).logprobs
            ]
        return batch.with_fields(reference=pad(known))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        config = self.config
        if config.divergence == "tv":
            return super().loss(batch)
        scores = self.policy.score(batch.prompts, batch.responses)
        mask, logp = scores.mask, scores.logprobs
        reference = batch.reference[:, : mask.shape[1]].to(logp)
        if config.level == "sequence":
            logp, reference = sequence_logprobs(logp, mask), sequence_logprobs(reference, mask)
        else:
            logp, reference = logp[mask], reference[mask]
        floor = _FLOOR if config.divergence == "hellinger" else -math.inf
        losses = f_divergence_sft(
            logp, reference, config.divergence, config.beta, self.value, floor
        )
        rho = implicit_reward(logp.detach(), reference, config.beta)
        below = rho + self.value < floor
        weights = demonstration_weight((rho + self.value).clamp(min=floor), config.divergence)
        return losses.sum() / batch.tokens, {
            "reward": float(rho.mean()),
            "weight": float(torch.where(below, 0.0, weights).mean()),
            "clamped": float(below.float().mean()),
        }

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        metrics = super().update(batch, optimise)
        if self.config.value_rate == 0:
            return metrics
        self.value -= self.config.value_rate * (1 - metrics["weight"])  # dL/dv
        return {**metrics, "value": self.value}

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
