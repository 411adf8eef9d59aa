"""The policy-gradient family on language: rollouts and advantages in, a clipped surrogate out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.language.base import (
    Given,
    LanguageSettings,
    RolloutSettings,
    draw_responses,
    find_materials,
    prompt_minibatches,
    require_minibatches,
)
from postgrad.methods.language.rollouts import (
    describe_rollouts,
    rollout_batch,
    rollout_rows,
)
from postgrad.objectives.policy_gradient import (
    aggregate,
    clip_fractions,
    clipped_surrogate,
    importance_ratio,
    kl_estimate,
)
from postgrad.sampling.generation import Rollouts
from postgrad.timing import timed


class PolicyGradientSettings(LanguageSettings):
    """Settings of the clipped policy-gradient methods on language."""

    rollout: RolloutSettings = setting(RolloutSettings(), "how the policy is sampled")
    epochs: int = setting(1, "passes over the rollouts of a step", gt=0)
    minibatches: int = setting(1, "optimiser steps a pass", gt=0)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", gt=0, lt=1)
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high", gt=0)
    dual_clip: float | None = setting(
        None, "bound on the loss of negative advantages (dual-clip PPO)", gt=1
    )
    importance: Literal["token", "sequence"] = setting("token", "level of the importance ratio")
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum-constant"] = setting(
        "token-mean", "how token losses become one; the constant is rollout.max_new_tokens"
    )
    kl_coefficient: float = setting(0.0, "weight of the KL to the initial policy", ge=0)


class ClippedPolicyGradient(Method):
    """Policy gradient on sampled responses. A subclass fills `collect` with `batch_of(...)`.

    With one optimiser step a rollout the policy that is updated is the policy that sampled, so the
    ratio is one by definition and its denominator is the detached numerator: no second pass over
    the old policy, and no mismatch between sampler and trainer. With more steps the old
    log-probabilities are scored once, before the first.
    """

    config: PolicyGradientSettings

    def __init__(
        self,
        config: PolicyGradientSettings,
        place: Place,
        formats: str,
        given: Given,
        *,
        held_out_formats: str | None = None,
    ):
        """The data come in `formats`, held-out data in `held_out_formats` where that differs."""
        super().__init__(config, place)
        require_minibatches(config.minibatches, config.batch_size)
        found = find_materials(config, place, formats, given, held_out_formats=held_out_formats)
        self.materials = found
        self.policy, self.data, self.held_out = found.policy, found.data, found.held_out
        self.order = found.order
        if config.kl_coefficient > 0:
            self.policy.freeze_reference()

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

    def batch_of(
        self,
        rollouts: Rollouts,
        step: int,
        *,
        group: Tensor,
        advantages: Tensor,
        reward: Tensor,
        terms: dict[str, Tensor],
    ) -> Batch:
        """Rollouts as a batch, with each one's group, advantage, reward and reward terms `[N]`."""
        batch = rollout_batch(
            rollouts, step, group=group, reward=reward, terms=terms, advantages=advantages.float()
        )
        if self.config.epochs * self.config.minibatches > 1:
            with timed("scoring"), torch.no_grad():
                batch = batch.with_fields(old_logprobs=self._score(batch).logprobs.cpu())
        return batch

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """Whole prompts' rollouts, shuffled anew in every epoch."""
        config = self.config
        return prompt_minibatches(batch, config.epochs, config.minibatches, self.place.seed)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        config = self.config
        scores = self._score(batch)
        mask, length = scores.mask, scores.mask.shape[1]
        new = scores.logprobs
        old = batch.old_logprobs[:, :length].to(new) if "old_logprobs" in batch else new.detach()
        advantages = batch.advantages.to(new.device)[:, None].expand_as(new)
        ratio = importance_ratio(new, old, mask, level=config.importance)
        per_token = clipped_surrogate(
            ratio, advantages, config.clip_low, config.clip_high, dual_clip=config.dual_clip
        )
        clipped = clip_fractions(
            ratio.detach(), advantages, config.clip_low, config.clip_high, mask
        )
        metrics = {f"ratio/{name}": float(value) for name, value in clipped.items()}
        metrics["ratio/mean"] = float(ratio.detach()[mask].mean())
        if config.kl_coefficient > 0:
            with torch.no_grad(), self.policy.reference():
                reference = self._score(batch).logprobs
            divergence = kl_estimate(new, reference, mask, kind="k3")
            per_token = per_token + config.kl_coefficient * divergence
            metrics["kl_to_reference"] = float(divergence.detach()[mask].mean())
        value = aggregate(
            per_token,
            mask,
            config.aggregation,
            items=batch.items,
            tokens=batch.tokens,
            constant=config.rollout.max_new_tokens,
        )
        return value, metrics

    def _score(self, batch: Batch) -> Any:
        return self.policy.score(
            batch.prompts, batch.responses, temperature=self.config.rollout.temperature
        )

    def describe_batch(self, batch: Batch) -> Metrics:
        return describe_rollouts(batch)

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return rollout_rows(self.policy, batch)

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
