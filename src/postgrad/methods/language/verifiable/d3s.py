"""D3S: dynamic dual-level down-sampling."""

import warnings
from typing import Literal

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics
from postgrad.methods.language.parts.base import Around
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.parts.estimator import per_token
from postgrad.methods.language.parts.masks import DualClip, PPOClip
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.sampling.down_sampling import (
    LinearSchedule,
    Scope,
    select_max_variance,
    select_tokens,
)


class DownSamplingSettings(DualClip):
    responses_initial: float = setting(
        0.25, "share of the responses that is learnt from, first", gt=0, le=1, source="(uncertain)"
    )
    responses_final: float = setting(1.0, "and last", gt=0, le=1, source="(uncertain)")
    tokens_initial: float = setting(
        0.2, "share of their tokens that is learnt from, first", gt=0, le=1, source="(uncertain)"
    )
    tokens_final: float = setting(1.0, "and last", gt=0, le=1, source="(uncertain)")
    across: Literal["batch", "group"] = setting(
        "batch", "responses are chosen from the whole batch, or from each group", source="paper"
    )
    per_group: float | None = setting(
        None,
        "share of each group that is chosen first, where two stages are wanted (uncertain); "
        "empty: one stage",
        gt=0,
        le=1,
    )
    scope: Scope = setting(
        "batch", "the share of tokens is one of all, or of each response's (uncertain)"
    )


class DownSampling(PPOClip):
    """responses of the most extreme advantages, tokens of the largest |A| entropy; PPO's clip (D3S)

    Responses that are not chosen leave the batch, before anything is scored for the update.
    """

    Config = DownSamplingSettings
    needs_entropies = True

    def __init__(self, config: DownSamplingSettings, around: Around):
        super().__init__(config, around)
        self.responses = LinearSchedule(config.responses_initial, config.responses_final)
        self.tokens = LinearSchedule(config.tokens_initial, config.tokens_final)
        for name, schedule in (("responses", self.responses), ("tokens", self.tokens)):
            if schedule.initial > schedule.final:
                warnings.warn(
                    f"mask.{name}_initial is above mask.{name}_final: less and less is learnt from",
                    stacklevel=2,
                )
        pool = around.samples if config.across == "group" else around.prompts * around.samples
        for name, share in (
            ("responses_initial", config.responses_initial),
            ("responses_final", config.responses_final),
            ("per_group", config.per_group),
        ):
            size = around.samples if name == "per_group" else pool
            if share is not None and round(share * size) < 2:
                raise PostgradError(
                    f"mask.{name}: a choice of the largest variance needs at least 2 responses, "
                    f"{share:g} of {size} are {round(share * size)}"
                )
        self._metrics: Metrics = {}

    def _progress(self, batch: Batch) -> float:
        return min(int(batch.step[0]) / self.around.steps, 1.0)

    def chosen(self, batch: Batch) -> Batch:
        config, share = self.config, self.responses.at(self._progress(batch))
        if config.per_group is not None:
            size = round(config.per_group * self.around.samples)
            batch = batch.select(select_max_variance(_of_response(batch), size, batch.group))
        if config.across == "group":
            most = int(batch.group.unique(return_counts=True)[1].min())
            size, groups = min(round(share * self.around.samples), most), batch.group
        else:
            everything = self.around.prompts * self.around.samples
            size, groups = min(round(share * everything), len(batch)), None
        batch = batch.select(select_max_variance(_of_response(batch), size, groups))
        advantages = _of_response(batch)
        self._metrics = {
            "selected/responses": float(len(batch)),
            "selected/variance": float(advantages.var()),
            "selected/without_advantage": float((advantages == 0).float().mean()),
        }
        return batch

    def prepared(self, batch: Batch) -> Batch:
        batch = super().prepared(batch)
        entropies = batch.entropies
        keys = per_token(batch.advantages, entropies).abs() * entropies
        # T of the chosen responses, which may be less than that of all
        there = batch.mask[:, : entropies.shape[1]]
        share = self.tokens.at(self._progress(batch))
        mask = torch.zeros_like(batch.mask)
        mask[:, : entropies.shape[1]] = select_tokens(keys, there, share, self.config.scope)
        self._metrics["selected/tokens"] = float(mask.sum())
        return batch.with_fields(mask=mask)

    def describe(self) -> Metrics:
        return self._metrics


def _of_response(batch: Batch) -> Tensor:
    """One advantage a response `[N]`; their mean where tokens differ."""
    advantages: Tensor = batch.advantages
    if advantages.dim() == 1:
        return advantages
    return torch.where(batch.mask, advantages, 0.0).sum(1) / batch.mask.sum(1).clamp(min=1)


class D3SSettings(RewardedPolicyGradientSettings):
    mask: MaskChoice = setting("d3s", "which tokens teach", source="paper")
    advantage: AdvantageChoice = setting(
        "standardised", "from rewards to advantages", source="paper"
    )


class D3S(PolicyGradient):
    """D3S: dynamic dual-level down-sampling (Wang et al. 2025, arXiv:2509.22115).

    Large groups dilute what they teach with responses and tokens that hardly matter. D3S learns
    from the N responses of the batch whose advantages, normalised in their groups, have the largest
    variance, which are always the most extreme ones; and of their tokens from the share K with the
    largest |A| times entropy. Both grow over the run, as few samples are learnt by heart later:

        S = argmax Var(A_S) over |S| = N,    T = top K of |A_i| H_{i,t} over the tokens of S
        L = 1/|T| sum_{(i,t) in T} max(-rho A_i, -clip(rho, 1 - low, 1 + high) A_i)
        [N, K](p) = (1 - p) [N, K]_initial + p [N, K]_final,    p = step / steps

    Advantages are not normalised again after the choice. It stands before any surrogate:
    `gradient=sequence` gives GSPO's, whose ratio is that of all tokens of the response while the
    loss counts the chosen ones; any `policy-gradient` takes `mask=d3s`. Entropies are those of the
    policy before the update. The sizes are not known from the paper, nor whether |T| or the
    response's own tokens divide the loss (uncertain): `aggregation=sequence-mean` is the latter.
    The metric `reward` is of all samples, the others are of those chosen.
    """

    Config = D3SSettings
    config: D3SSettings

    def selected(self, batch: Batch) -> Batch:
        batch = super().selected(batch)
        self._rewards = batch.reward
        return batch

    def describe_batch(self, batch: Batch) -> Metrics:
        return {**super().describe_batch(batch), "reward": float(self._rewards.mean())}
