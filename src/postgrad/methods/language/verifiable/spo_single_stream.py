"""Single-stream Policy Optimization."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.advantages.group import batch_standardised, spread_to_tokens
from postgrad.advantages.value_tracker import BetaValueTracker, kept_share, policy_shift
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.base import Given, RolloutSettings, pad
from postgrad.methods.language.parts.base import Advantage, Around, Scoring
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.sampling.prompt_choice import draw_by_weight, uncertainty
from postgrad.seeding import generator

_CODE = "official code"


class TrackerSettings(Settings):
    """How fast the values of prompts forget, and over what advantages are standardised."""

    forgetting: Literal["adaptive", "constant"] = setting(
        "adaptive", "by how far the policy has moved since the prompt's last visit, or as keep_low"
    )
    keep_low: float = setting(0.875, "rho_min: least share of the past", gt=0, lt=1, source=_CODE)
    keep_high: float = setting(0.96, "rho_max: greatest share of it", gt=0, lt=1, source=_CODE)
    half_life: float = setting(
        0.06, "mean change of a token's log-probability that halves the past", gt=0, source=_CODE
    )
    standardise: Literal["responses", "tokens"] = setting(
        "responses", "to mean 0, deviation 1 over the batch's responses, or over its tokens",
        source=_CODE,
    )  # fmt: skip


class SingleStream(Advantage):
    """reward minus the tracked value of its prompt, over the batch's standard deviation (SPO)

    For each prompt of the data a `BetaValueTracker` keeps the success rate, and this the last
    response to it with its log-probabilities, by which the policy's shift since then is measured.
    """

    Config = TrackerSettings

    def __init__(self, config: TrackerSettings, around: Around):
        super().__init__(config, around)
        if config.keep_low >= config.keep_high:
            raise PostgradError(
                f"advantage.keep_low: must be below advantage.keep_high, {config.keep_high:g}, "
                f"got {config.keep_low:g}"
            )
        if not around.rows:
            raise PostgradError(
                "advantage: single-stream tracks the prompts of a data set, and here there is none"
            )
        if around.prompts * around.samples < 2:
            raise PostgradError(
                "batch_size: single-stream standardises over the batch, so it needs at least 2 "
                "responses a step, got 1"
            )
        self.tracker = BetaValueTracker(len(around.rows))
        self._visits: dict[int, tuple[Tensor, Tensor]] = {}  # tokens and log-probabilities by row

    def __call__(self, batch: Batch) -> Tensor:
        reward = successes(batch.reward)
        surprise = reward - self.tracker.values(batch.row).to(reward)
        if self.config.standardise == "responses":
            return batch_standardised(surprise)
        return batch_standardised(spread_to_tokens(surprise, batch.mask), batch.mask)

    def after(self, batch: Batch, score: Scoring) -> None:
        batch = batch.select((batch.step == batch.step[0]).nonzero().squeeze(1))  # nothing replayed
        keep = torch.full((len(batch),), self.config.keep_low)
        if self.config.forgetting == "adaptive":
            keep = kept_share(
                self._shifts(batch, score),
                self.config.keep_low,
                self.config.keep_high,
                self.config.half_life,
            )
            now = score(batch).cpu()
            if "written" in batch:  # what a tool said tells nothing of the policy
                now = now.masked_fill(~batch.written, torch.nan)
            for i, row in enumerate(batch.row.tolist()):
                tokens = batch.responses[i].cpu()
                self._visits[row] = tokens, now[i, : len(tokens)]
        self.tracker.update(batch.row, batch.reward, keep)

    def _shifts(self, batch: Batch, score: Scoring) -> Tensor:
        """How far the policy has moved `[N]` since the last visits of the batch's prompts."""
        shifts = torch.zeros(len(batch))
        known = [i for i, row in enumerate(batch.row.tolist()) if row in self._visits]
        if known:
            tokens, before = zip(*(self._visits[int(batch.row[i])] for i in known), strict=True)
            earlier = Batch(prompts=[batch.prompts[i] for i in known], responses=list(tokens))
            mask = pad([~logprobs.isnan() for logprobs in before])
            shifts[known] = policy_shift(pad(list(before)), score(earlier).cpu(), mask)
        return shifts

    def describe(self) -> dict[str, float]:
        return {
            "value/mean": float(self.tracker.values().mean()),
            "value/size": float(self.tracker.sizes().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.tracker.state_dict()
        if self._visits:
            tokens, logprobs = zip(*self._visits.values(), strict=True)
            state["rows"] = torch.tensor(list(self._visits))
            state["lengths"] = torch.tensor([len(response) for response in tokens])
            state["tokens"] = torch.cat(tokens).int()
            state["logprobs"] = torch.cat(logprobs)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state)
        if "rows" in state:
            lengths = state["lengths"].tolist()
            parts = (state["tokens"].long().split(lengths), state["logprobs"].split(lengths))
            self._visits = dict(zip(state["rows"].tolist(), zip(*parts, strict=True), strict=True))


def successes(reward: Tensor) -> Tensor:
    """The rewards, which must be between 0 and 1."""
    if bool(((reward < 0) | (reward > 1)).any()):
        raise PostgradError(
            "reward: single-stream counts rewards as successes, so they must lie between 0 and 1, "
            f"got {float(reward.min()):g} to {float(reward.max()):g}"
        )
    return reward


class SPOSettings(RewardedPolicyGradientSettings):
    """Settings of single-stream policy optimisation."""

    advantage: AdvantageChoice = setting(
        "single-stream", "from rewards to advantages", source=_CODE
    )
    mask: MaskChoice = setting(
        {"name": "ppo", "clip_high": 0.28, "dual_clip": 10.0},
        "which tokens teach, by how far the policy has moved",
        source=_CODE,
    )
    rollout: RolloutSettings = setting(RolloutSettings(samples=1), "how the policy is sampled")
    batch_size: int = setting(64, "prompts a step (paper: 1024)", gt=0)
    minibatches: int = setting(8, "optimiser steps a pass", gt=0, source=_CODE)
    offline_samples: int = setting(
        8, "responses to EVERY prompt before the first step, for its first value; 0: none", ge=0,
        source=_CODE,
    )  # fmt: skip
    prompts: Literal["prioritised", "in turn"] = setting(
        "prioritised", "the most uncertain ones more often, or each once an epoch"
    )
    exploration: float = setting(
        0.05, "eps: what a prompt's weight has besides its uncertainty", ge=0, source=_CODE
    )


class SPO(PolicyGradient):
    """Single-stream Policy Optimization (Xu and Ding 2025, arXiv:2509.13232).

    One response to a prompt, no group: the baseline is a Beta-Bernoulli value v of the prompt that
    remembers earlier steps, and forgets them the faster the policy has moved since. Advantages are
    standardised over the batch, so no response is wasted in a group where all are alike, and none
    waits for its siblings.

        A_i = (r_i - v_i - mean) / (std + 1e-8)            v = alpha / (alpha + beta)
        alpha <- rho alpha + r,   beta <- rho beta + 1 - r      after the policy's update
        rho = clamp(2^(-D / 0.06), 0.875, 0.96),  D = mean_t |log pi_then(y_t) - log pi_now(y_t)|

    y is the response of the prompt's last visit, scored by the policy then and now; at the first
    visit D = 0. Prompts are drawn, without repeats, in proportion to sqrt(v (1 - v)) + eps. Values
    start from `offline_samples` responses to every prompt, which count as 1 / (1 - rho_min) = 8.

    As in the official code, D is a mean absolute log-ratio, where the paper speaks of a KL. Unlike
    there, prompts are drawn from the whole data set and not from a shard of it, and responses to
    one prompt in one batch are all counted, not the last alone. Training rewards are those of the
    prompts that were chosen: compare methods on held-out data.
    """

    Config = SPOSettings
    config: SPOSettings

    def __init__(
        self, config: SPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        super().__init__(config, place, reward=reward, **given)
        if not isinstance(self.estimator.advantage, SingleStream):
            raise PostgradError(
                "advantage: spo-single-stream draws prompts by the values that "
                f"advantage=single-stream tracks, got {config.advantage.name!r}: "
                "`postgrad train policy-gradient` takes any"
            )
        self.credit = self.estimator.advantage
        self._started = config.offline_samples == 0

    def choose(self, step: int) -> list[int]:
        if not self._started:
            self._start()
        if self.config.prompts == "in turn":
            return super().choose(step)
        weights = uncertainty(self.credit.tracker.values(), self.config.exploration)
        random = generator(self.place.seed, "prompts", step)
        chosen: list[int] = draw_by_weight(weights, self.config.batch_size, random).tolist()
        return chosen

    def _start(self) -> None:
        """First values of all prompts, from samples of the policy at the run's start."""
        samples, counts = self.config.offline_samples, []
        for first in range(0, len(self.prompts), self.config.batch_size):
            part = slice(first, first + self.config.batch_size)
            rollouts = self.roll_out(self.prompts[part], "offline", first, samples=samples)
            rows = [row for row in self.data.rows[part] for _ in range(samples)]
            reward, _ = self.judge(rows, rollouts)
            counts.append(successes(reward).view(-1, samples).sum(1))
        weight = 1 / (1 - self.credit.config.keep_low)
        self.credit.tracker.start(torch.cat(counts), samples, weight)
        self._started = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._started = state["started"]
