"""Discriminative constrained optimisation: right responses above wrong ones, near the sampler."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Place
from postgrad.methods.language.base import Given, RolloutSettings
from postgrad.methods.language.parts.estimator import written
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.models.scoring import TokenScores
from postgrad.objectives.discriminative import (
    Score,
    discriminative_objective,
    hinge_coefficient,
    odd_values,
    old_divergence,
    sequence_score,
)
from postgrad.timing import timed

TAU: dict[Score, float] = {"log-likelihood": 10.0, "likelihood-ratio": 1.0}
_UNUSED = ("mask", "denominator", "advantage", "gradient", "aggregation")


class DisCOSettings(RewardedPolicyGradientSettings):
    """DisCO's settings; the defaults are those of the official scripts."""

    score: Score = setting(
        "log-likelihood", "of a response: mean log pi, or mean pi/pi_old, of its tokens"
    )
    negatives: Literal["log-sum-exp", "mean"] = setting(
        "log-sum-exp", "how wrong responses count: those of high score most, or alike (DisCO-b)"
    )
    tau: float | None = setting(
        None,
        "temperature of log-sum-exp; empty: 10 for log-likelihood, 1 for likelihood-ratio",
        gt=0,
        source="official scripts",
    )
    delta: float = setting(
        1e-4, "KL to the sampler that costs nothing", ge=0, source="official scripts"
    )
    beta: float = setting(1e3, "slope of the cost beyond it", ge=0, source="official scripts")
    constraint: Literal["k1", "k3"] = setting(
        "k1", "estimate of that KL of a token", source="official configuration: kl"
    )
    minibatches: int = setting(4, "optimiser steps a pass", gt=0, source="official scripts")
    rollout: RolloutSettings = setting(
        RolloutSettings(temperature=0.6), "how the policy is sampled", source="official scripts"
    )


class DisCO(PolicyGradient):
    """Discriminative constrained optimisation (Li et al. 2025, arXiv:2505.12366).

    With rewards of 0 and 1, GRPO raises right responses over wrong ones, but weighs a prompt by
    sqrt(p (1 - p)), p being how often it is solved: easy and hard prompts hardly count. DisCO drops
    the weight, scores responses without clipping, lets the wrong responses of high score count
    most, and keeps near the policy that sampled by a penalty on the KL beyond a small allowance:

        J(x) = 1/n+ sum_right s(y) - tau log 1/n- sum_wrong exp(s(y')/tau)
        L    = -mean_x J(x) + (beta/2) [D - delta]_+^2,   D = mean over tokens of log pi_old/pi
        s(y) = mean over tokens of log pi, or of pi/pi_old

    Prompts without right or without wrong responses have J = 0 and count in the means. With
    `negatives=mean` (DisCO-b) the wrong responses count alike.

    J compares the responses to a prompt and D is of all tokens, so neither is a sum over parts of
    a batch. Both are therefore first computed for the whole batch of an optimiser step, without
    gradients; given the weights dJ/ds and the slope of the penalty, which are constants, the
    gradient is a sum over responses and exact however `token_budget` cuts the batch. This costs
    a forward pass a step.

    Deviations: the penalty's gradient is the official code's, half of that of the paper's
    beta [D - delta]_+^2, for beta was tuned with it. The code's value of the log-sum-exp is
    meaningless, its gradient is the one here; its KL is of a micro-batch.
    """

    Config = DisCOSettings
    corrected = False  # its scores are of whole responses, which have no weights by token
    config: DisCOSettings
    parts = FourParts(
        mask="none: a penalty on the KL to the sampler in its place",
        denominator="the policy (log-likelihood) or the sampler (likelihood-ratio)",
        advantage="1/n+ for right responses, -softmax(s/tau) over the wrong ones of a prompt",
        gradient="mean over a response's tokens of log pi or pi/pi_old",
    )

    def __init__(
        self,
        config: DisCOSettings,
        place: Place,
        *,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        defaults = DisCOSettings()
        for name in _UNUSED:
            if getattr(config, name) != getattr(defaults, name):
                raise PostgradError(
                    f"{name}: DisCO's objective compares whole responses and has no such part; "
                    "leave it out"
                )
        if config.kl_coefficient > 0:
            raise PostgradError(
                f"kl_coefficient: expected 0, got {config.kl_coefficient:g}: DisCO stays near the "
                "sampler by delta and beta"
            )
        if config.tau is not None and config.negatives == "mean":
            raise PostgradError(
                "tau: DisCO-b, negatives=mean, has no temperature; leave it out or take "
                "negatives=log-sum-exp"
            )
        super().__init__(config, place, reward=reward, **given)

    def learnable(self, batch: Batch) -> Batch:
        if odd := odd_values(batch.reward):
            raise PostgradError(
                f"reward: DisCO tells right responses from wrong ones, so rewards must be 0 or 1, "
                f"got {odd}"
            )
        return super().learnable(batch)

    def update(self, batch: Batch, optimise: Any) -> Metrics:
        def optimised(part: Batch) -> Metrics:
            with timed("scoring"), torch.no_grad(), optimise.autocast():
                part = self.measured(part, self._score(part))
            found: Metrics = optimise(self.loss, part)
            return found

        every = [optimised(part) for part in self.minibatches(batch)]
        return {name: sum(m[name] for m in every) / len(every) for name in every[0]}

    def measured(self, batch: Batch, scores: TokenScores) -> Batch:
        """The whole batch with what does not add up over its parts: weights dJ/ds and the slope."""
        config, old = self.config, self.estimator.old_logprobs(batch, scores)
        logprobs = scores.logprobs.detach()
        mask = written(batch, scores)
        score = sequence_score(logprobs, old, mask, config.score).requires_grad_()
        tau = None if config.negatives == "mean" else config.tau or TAU[config.score]
        with torch.enable_grad():
            objective = discriminative_objective(
                score, batch.reward.to(score), batch.group.to(score.device), tau
            )
            (weights,) = torch.autograd.grad(objective, score)
        divergence = old_divergence(logprobs, old, mask, config.constraint)
        mean = float(divergence.sum() / mask.sum())
        slope = hinge_coefficient(mean, config.delta, config.beta)
        return batch.with_fields(
            score_weights=weights.cpu(),
            slope=torch.full((len(batch),), slope),
            objective=torch.full((len(batch),), objective.item()),
            divergence=torch.full((len(batch),), mean),
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        config = self.config
        scores = self._score(batch, entropy=config.entropy_coefficient > 0)
        if "score_weights" not in batch:
            batch = self.measured(batch, scores)
        logprobs, old = scores.logprobs, self.estimator.old_logprobs(batch, scores)
        mask = written(batch, scores)
        score = sequence_score(logprobs, old, mask, config.score)
        objective = (batch.score_weights.to(score) * score).sum()
        divergence = old_divergence(logprobs, old, mask, config.constraint)
        loss = -objective + float(batch.slope[0]) * divergence.sum() / batch.tokens
        metrics = {
            "objective": float(batch.objective[0]),
            "kl_from_sampler": float(batch.divergence[0]),
            "penalty/slope": float(batch.slope[0]),
        }
        if scores.entropies is not None:
            entropy = torch.where(mask, scores.entropies, 0.0).sum() / batch.tokens
            loss = loss - config.entropy_coefficient * entropy
            metrics["entropy"] = float(scores.entropies.detach()[mask].mean())
        return loss, metrics
