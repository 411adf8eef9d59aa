"""The policy-gradient family on language: sampled responses, and the estimator of four parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import FourParts, Method, Metrics, NothingToLearn, Place
from postgrad.methods.language.base import (
    Given,
    LanguageSettings,
    Materials,
    RolloutSettings,
    draw_responses,
    find_examples,
    find_policy,
    prompt_minibatches,
    require_minibatches,
)
from postgrad.methods.language.correction import EngineCorrection
from postgrad.methods.language.parts.base import Around
from postgrad.methods.language.parts.estimator import Estimator, EstimatorSettings, written
from postgrad.methods.language.rollouts import describe_rollouts, rollout_rows
from postgrad.models.scoring import TokenScores
from postgrad.objectives.policy_gradient import Aggregation, aggregate, kl_estimate
from postgrad.sampling.generation import Rollouts
from postgrad.timing import timed


class PolicyGradientSettings(EstimatorSettings, LanguageSettings):
    """Settings of the policy gradients on language."""

    rollout: RolloutSettings = setting(RolloutSettings(), "how the policy is sampled")
    epochs: int = setting(1, "passes over the rollouts of a step", gt=0)
    minibatches: int = setting(1, "optimiser steps a pass", gt=0)
    aggregation: Aggregation = setting(
        "token-mean", "how token losses become one; the constant is rollout.max_new_tokens"
    )
    kl_coefficient: float = setting(0.0, "weight of the KL to another policy in the loss", ge=0)
    kl_reference: Literal["initial", "sampler"] = setting(
        "initial", "the policy of the KL: that of the run's start, or the one that sampled"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = setting(
        "k3", "of a token's KL: d, d^2/2, exp(-d) - 1 + d, with d the log-ratio"
    )
    kl_level: Literal["token", "sequence"] = setting(
        "token", "whose log-ratio d is: each token's, or the whole response's"
    )
    entropy_coefficient: float = setting(0.0, "weight of the entropy bonus", ge=0)


class SampledPolicyGradient(Method):
    """Policy gradient on sampled responses. A subclass fills `collect`, with `learnable(...)`.

    With one optimiser step a rollout the policy that is updated is the policy that sampled, so the
    ratio is one by definition and its denominator is the detached numerator: no second pass over
    the old policy, and no mismatch between sampler and trainer. With more steps the old
    log-probabilities are scored once, before the first.
    """

    draws_ahead: ClassVar[bool] = False  # whether responses may be of older weights, drawn ahead
    corrected: ClassVar[bool] = True  # for what an engine's probabilities differ by
    config: PolicyGradientSettings

    def __init__(
        self,
        config: PolicyGradientSettings,
        place: Place,
        formats: str | tuple[str, ...],
        given: Given,
        *,
        held_out_formats: str | None = None,
    ):
        """The data come in `formats`, held-out data in `held_out_formats` where that differs."""
        super().__init__(config, place)
        require_minibatches(config.minibatches, config.batch_size)
        self.data, self.held_out, self.order = find_examples(
            config, place, formats, given, held_out_formats=held_out_formats
        )
        # what does not go together is said before a model is loaded
        self.estimator = Estimator(
            config,
            Around(
                seed=place.seed,
                steps=place.steps,
                prompts=config.batch_size,
                samples=config.rollout.samples,
                updates=config.epochs * config.minibatches,
                stale=self.stale,
                rows=self.data.rows,
            ),
        )
        self.policy = find_policy(
            config, place, given, corrected=self.corrected, ahead=self.draws_ahead
        )
        self.correction = EngineCorrection(self.policy, config.rollout)
        self.materials = Materials(self.policy, self.data, self.held_out, self.order)
        if config.kl_coefficient > 0 and config.kl_reference == "initial":
            self.policy.freeze_reference()

    @classmethod
    def four_parts(cls) -> FourParts | None:
        return cls.parts or Estimator.described(cls.Config)

    @property
    def stale(self) -> bool:
        """Whether an older policy samples."""
        return False

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def roll_out(
        self,
        prompts: list[Tensor],
        *stream: str | int,
        samples: int | None = None,
        temperature: float | None = None,
    ) -> Rollouts:
        """Responses of the policy, with the run's seed (see `draw_responses`)."""
        return draw_responses(
            self.policy,
            prompts,
            self.config.rollout,
            self.place.seed,
            *stream,
            samples=samples,
            temperature=temperature,
        )

    def learnable(self, batch: Batch) -> Batch:
        """A batch of rewarded responses with advantages and all that stays fixed in the updates.

        Raises:
            NothingToLearn: no token is left that counts.
        """
        batch = self.estimator.prepared(batch, self._with_entropies)
        if not bool(batch.mask.any()):
            raise NothingToLearn("every response of the step was left out")
        return self.with_old_logprobs(batch) if self.needs_old_logprobs else batch

    def with_old_logprobs(self, batch: Batch) -> Batch:
        """The batch with the log-probabilities that its tokens have now, unless it has any."""
        if "old_logprobs" in batch:
            return batch
        with timed("scoring"), torch.no_grad():
            return batch.with_fields(old_logprobs=self._score(batch).logprobs.cpu())

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy that is updated will differ from the one that sampled."""
        return self.config.epochs * self.config.minibatches > 1

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """Whole prompts' rollouts, shuffled anew in every epoch."""
        config = self.config
        return prompt_minibatches(batch, config.epochs, config.minibatches, self.place.seed)

    def update(self, batch: Batch, optimise: Any) -> Metrics:
        metrics = super().update(batch, optimise)
        with torch.no_grad(), optimise.autocast():
            self.estimator.after(batch, lambda other: self._score(other).logprobs)
        return metrics

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        bonus = self.config.entropy_coefficient
        scores = self._score(batch, entropy=bonus > 0)
        per_token, metrics = self.token_losses(batch, scores)
        # of older samples the old log-probabilities are the engine's: nothing is left to correct
        if self.correction.needed and not self.stale:
            old = self.estimator.old_logprobs(batch, scores)
            per_token = per_token * self.correction.weights(batch, old, self.drawn(batch, scores))
        if self.config.kl_coefficient > 0:
            divergence = self.divergence(batch, scores)
            scale = self.config.kl_coefficient
            if "kl_scale" in batch:
                scale = scale * batch.kl_scale.to(divergence)[:, None]
            per_token = per_token + scale * divergence
            metrics["kl_to_reference"] = float(divergence.detach()[scores.mask].mean())
        if scores.entropies is not None:
            per_token = per_token - bonus * scores.entropies
            metrics["entropy"] = float(scores.entropies.detach()[scores.mask].mean())
        return self.aggregated(per_token, batch, scores), metrics

    def token_losses(self, batch: Batch, scores: TokenScores) -> tuple[Tensor, Metrics]:
        """The estimator's loss of each token `[N, T]`, and metrics."""
        return self.estimator.token_losses(batch, scores)

    def drawn(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Which tokens `[N, T]` were drawn after the very prompt that they are learnt with."""
        return written(batch, scores)

    def divergence(self, batch: Batch, scores: TokenScores) -> Tensor:
        """The KL of each token `[N, T]`, as an estimate by the sampled one."""
        new = scores.logprobs
        if self.config.kl_reference == "sampler":
            reference = self.estimator.old_logprobs(batch, scores)
        else:
            with torch.no_grad(), self.policy.reference():
                reference = self._score(batch).logprobs
        kind, level = self.config.kl_estimator, self.config.kl_level
        return kl_estimate(new, reference, scores.mask, kind, level)

    def aggregated(self, per_token: Tensor, batch: Batch, scores: TokenScores) -> Tensor:
        """Token losses `[N, T]` as the batch's share in one number."""
        return aggregate(
            per_token,
            batch.mask[:, : per_token.shape[1]].to(scores.mask) & scores.mask,
            self.config.aggregation,
            items=batch.items,
            tokens=batch.tokens,
            constant=self.config.rollout.max_new_tokens,
        )

    def _with_entropies(self, batch: Batch) -> Batch:
        if "entropies" in batch:
            return batch
        with timed("scoring"), torch.no_grad():
            scores = self._score(batch, entropy=True)
        assert scores.entropies is not None
        return batch.with_fields(entropies=scores.entropies.cpu())

    def _score(self, batch: Batch, entropy: bool = False) -> TokenScores:
        return self.policy.score(
            batch.prompts,
            batch.responses,
            temperature=self.config.rollout.temperature,
            entropy=entropy,
        )

    def engine_metrics(self) -> Metrics:
        return {**super().engine_metrics(), **self.correction.metrics()}

    def describe_batch(self, batch: Batch) -> Metrics:
        return {**describe_rollouts(batch), **self.estimator.describe()}

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return rollout_rows(self.policy, batch)

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return self.estimator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.estimator.load_state_dict(state)

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
