"""Truncated Proximal Policy Optimization."""

from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.advantages.group import batch_standardised
from postgrad.advantages.temporal import egae
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Optimise, Place
from postgrad.methods.language.base import Given, RolloutSettings, prompt_minibatches
from postgrad.methods.language.rlhf.actor_critic import (
    ActorCritic,
    ActorCriticSettings,
    at_last_token,
    over_tokens,
)
from postgrad.methods.language.rollouts import TERM, describe_rollouts, rollout_batch
from postgrad.sampling.generation import Rollouts
from postgrad.sampling.slots import Slots, Windows
from postgrad.timing import timed


class TPPOSettings(ActorCriticSettings):
    """Settings of truncated PPO."""

    window: int = setting(
        24, "l: most new tokens of a response a step; max_new_tokens is the most in all", gt=0,
        source="paper: 8k of 24k",
    )  # fmt: skip
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=1, max_new_tokens=72), "how the policy is sampled"
    )
    critic_warm_up: int = setting(
        10, "first steps, in which the critic alone learns (uncertain)", ge=0
    )
    critic_rate: float = setting(
        2.0, "the critic's learning rate, in multiples of the policy's (uncertain)", gt=0
    )
    epochs: int = setting(1, "passes over the windows of a step", gt=0)
    minibatches: int = setting(4, "optimiser steps a pass (paper: 16 of 512, uncertain)", gt=0)
    clip_high: float = setting(0.28, "the ratio is at most 1 + clip_high (uncertain)", gt=0)
    value_clip: float | None = setting(
        None, "new values are clipped to old ones ± value_clip", gt=0
    )
    kl_coefficient: float = setting(0.0, "there is no KL", ge=0, source="paper")


class TPPO(ActorCritic):
    """Truncated Proximal Policy Optimization (Fan et al. 2025, arXiv:2506.15050).

    PPO waits for the longest response of every step. Here each of a fixed number of slots adds at
    most l tokens to its response a step; the policy learns from these at once, what is unfinished
    goes on in the next step, and what has finished makes room for a new prompt.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   V(s_e) = 0 if finished, else V(s_{e-1})
        A_t     = delta_t + gamma lambda A_{t+1}     (EGAE) in the window, then standardised
        L       = mean over tokens of the windows of max(-rho A, -clip(rho, 0.8, 1.28) A)
        L_V     = mean over tokens of finished responses of (V(s_t) - G_t)^2 / 2

    G is the discounted final reward, so the critic's targets have no bias from bootstrapping, and
    the two losses are over different tokens. rho is to the policy that sampled the window; earlier
    tokens, of earlier policies, are context. With a window of `max_new_tokens` it is PPO whose
    critic learns from returns.

    A response that reaches `max_new_tokens` counts as finished, and is judged as it is. The critic
    starts from the policy's body and a head of 0, and learns alone for some steps, as the authors'
    earlier recipes have it (uncertain here, like the clip's bounds, the rates and standardised
    advantages). There is no KL. Responses end by the end token: a stop string could lie across two
    windows. Short responses finish first, so early targets of the critic are of those.
    """

    Config = TPPOSettings
    parts = FourParts(
        mask="PPO clip on the tokens of this step's windows alone",
        denominator="the policy that sampled the window",
        advantage="EGAE(gamma, lambda): GAE in which an unfinished response keeps its last value",
        gradient="token log-likelihood ratio",
    )
    config: TPPOSettings

    def __init__(
        self, config: TPPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        longest = config.rollout.max_new_tokens
        if config.window > longest:
            raise PostgradError(
                f"window: at most rollout.max_new_tokens, {longest}, got {config.window}"
            )
        if config.rollout.stop:
            raise PostgradError(
                "rollout.stop: t-ppo ends responses by the end token, for a stop string could lie "
                f"across two windows, got {config.rollout.stop!r}"
            )
        if config.kl_coefficient or config.kl_target is not None:
            raise PostgradError(
                "kl_coefficient, kl_target: t-ppo has no KL, as the critic's targets are final "
                "rewards: expected 0 and nothing"
            )
        super().__init__(config, place, reward=reward, **given)
        self.slots = Slots(config.batch_size * config.rollout.samples)

    @property
    def clip_range(self) -> tuple[float, float]:
        return self.config.clip, self.config.clip_high

    def collect(self, step: int) -> Batch:
        with timed("rollout"):
            windows = self.slots.advance(
                self.policy,
                lambda item: self.prompts[self._row(item)],
                self.config.rollout.sampling(),
                self.config.window,
                self.place.seed,
            )
        reward, terms = self._judged(windows)
        batch = rollout_batch(
            windows.rollouts,
            step,
            group=torch.arange(len(windows.items)),
            reward=reward,
            terms=terms,
            origin=windows.prompts,
            so_far=windows.whole,
            complete=windows.complete,
        )
        with timed("scoring"):
            batch = batch.with_fields(
                old_logprobs=over_tokens(batch, self._score),
                old_values=over_tokens(batch, self._values),
            )
        return self.with_advantages(batch)

    def _row(self, item: int) -> int:
        """The row of data of a response, counted from 0 over the run."""
        return self.order.item(item // self.config.rollout.samples)

    def _judged(self, windows: Windows) -> tuple[Tensor, dict[str, Tensor]]:
        """The rewards `[N]` of what is complete, 0 elsewhere, and their terms."""
        done = windows.complete.nonzero().squeeze(1)
        reward = torch.zeros(len(windows.items))
        if len(done) == 0:
            return reward, {}
        places = done.tolist()
        responses = [windows.whole[i] for i in places]
        rollouts = Rollouts(
            prompts=[windows.prompts[i] for i in places],
            responses=responses,
            logprobs=[windows.rollouts.logprobs[i] for i in places],
            finished=windows.rollouts.finished[done],
            texts=[self.policy.decode(response) for response in responses],
        )
        rows = [self.data.rows[self._row(windows.items[i])] for i in places]
        values, terms = self.judge(rows, rollouts)
        reward[done] = values.float()
        return reward, {
            name: torch.zeros(len(reward)).index_copy(0, done, term.float())
            for name, term in terms.items()
        }

    def worth(self, batch: Batch) -> Tensor:
        """What responses are worth at their end `[N]`; 0 where that is still to come."""
        cut = self.config.missing_end_penalty * (~batch.finished).float()
        return torch.where(batch.complete, batch.reward - cut, 0.0)

    def token_rewards(self, batch: Batch) -> Tensor:
        return at_last_token(self.worth(batch), batch.mask)

    def with_advantages(self, batch: Batch) -> Batch:
        rewards = self.token_rewards(batch)
        advantages = egae(
            rewards,
            batch.old_values,
            batch.mask,
            batch.complete,
            discount=self.config.discount,
            lambda_=self.config.gae_lambda,
        )
        if self.config.standardise:
            advantages = batch_standardised(advantages, batch.mask)
        return batch.with_fields(token_rewards=rewards, advantages=advantages)

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        config, step = self.config, int(batch.step[0])
        metrics: Metrics = {}
        if step >= config.critic_warm_up:
            metrics = _means([optimise(self.loss, p, "policy") for p in self.minibatches(batch)])
        if bool(batch.complete.any()):
            whole = self.finished_responses(batch)
            parts = prompt_minibatches(whole, config.epochs, config.minibatches, self.place.seed)
            value = _means([self.learn_values(part, optimise) for part in parts])
            metrics |= {"value/loss": value["loss"], "value/gradient_norm": value["gradient_norm"]}
        return metrics

    def finished_responses(self, batch: Batch) -> Batch:
        """The critic's batch: responses that are complete, in whole, with `returns` `[N, T]`."""
        done = batch.select(batch.complete.nonzero().squeeze(1))
        lengths = torch.tensor([len(response) for response in done.so_far])
        places = torch.arange(int(lengths.max()))[None]
        mask = places < lengths[:, None]
        to_go = (lengths[:, None] - 1 - places).clamp(min=0)
        whole = Batch(
            prompts=done.origin,
            responses=done.so_far,
            mask=mask,
            cost=lengths,
            shared_cost=torch.tensor([len(prompt) for prompt in done.origin]),
            group=torch.arange(len(done)),
            step=done.step,
            returns=torch.where(mask, self.worth(done)[:, None] * self.config.discount**to_go, 0.0),
        )
        if self.config.value_clip is None:
            return whole
        with timed("scoring"):
            return whole.with_fields(old_values=over_tokens(whole, self._values))

    def describe_batch(self, batch: Batch) -> Metrics:
        """Rewards and lengths are of complete responses, and left out where there are none."""
        metrics = describe_rollouts(batch)
        done = batch.complete
        lengths = torch.tensor([float(len(response)) for response in batch.so_far])
        described = {
            "response/entropy": metrics["response/entropy"],
            "advantage/spread": metrics["advantage/spread"],
            "response/complete": float(done.float().mean()),
            "value/mean": float(batch.old_values[batch.mask].mean()),
        }
        if bool(done.any()):
            terms = [name for name in batch.fields() if name.startswith(TERM)]
            described |= {n: float(batch.fields()[n][done].mean()) for n in ("reward", *terms)}
            described["response/length"] = float(lengths[done].mean())
            described["response/truncated"] = float((~batch.finished[done]).float().mean())
        if not bool(done.all()):
            described["response/carried"] = float(lengths[~done].mean())
        return described

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slots": self.slots.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.slots.load_state_dict(state["slots"])


def _means(every: list[Metrics]) -> Metrics:
    return {name: sum(m[name] for m in every) / len(every) for name in every[0]}
