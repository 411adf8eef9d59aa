"""Policy gradient from a reward, composed of any four parts."""

from contextlib import nullcontext
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.agents.tools import ToolChoice, made_tool
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import Given, render_prompts, response_seeds
from postgrad.methods.language.engines import not_older
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.policy_gradient import PolicyGradientSettings, SampledPolicyGradient
from postgrad.methods.language.rewarded import RewardedSettings, TaskReward
from postgrad.methods.language.rollouts import rollout_batch
from postgrad.models.snapshots import LaggingPolicy
from postgrad.sampling.ahead import Ahead
from postgrad.sampling.carried import CarriedGroups
from postgrad.sampling.conversations import converse
from postgrad.sampling.engines import Wanted
from postgrad.sampling.generation import Rollouts, generate, wanted
from postgrad.sampling.past import PastSamples
from postgrad.seeding import derive, generator
from postgrad.timing import timed


class RewardedPolicyGradientSettings(RewardedSettings, PolicyGradientSettings):
    """Settings of the policy gradients from a reward."""

    advantage: AdvantageChoice = setting("centred", "from rewards to advantages")
    tool: ToolChoice = setting("none", "what the policy can call while it writes")
    max_turns: int = setting(4, "how often the policy may write in a response, with a tool", gt=0)
    sync_every: int = setting(
        1, "steps between the updates of the policy that samples; above 1 it lags behind", gt=0
    )
    sync_delay: int = setting(0, "steps until such an update arrives", ge=0)
    replay: int = setting(
        0, "prompts a step whose responses are of earlier steps, besides the fresh ones", ge=0
    )
    replay_steps: int = setting(8, "how many steps back they reach", gt=0)
    carry: int = setting(
        0, "prompts under way beyond those of a step, which takes the first that are complete; the "
        "others' responses go on in the next", ge=0, source="APRIL, arXiv:2509.18521"
    )  # fmt: skip
    window: int | None = setting(
        None, "with carry: new tokens after which it is seen what is complete; a quarter of "
        "rollout.max_new_tokens when empty", gt=0
    )  # fmt: skip


# what a method may not do its own way where responses are drawn ahead or carried over, and why
_OWN_WAYS = {
    "choose": "chooses prompts by what it has just learnt",
    "sampled": "draws again by what it has drawn first",
    "collect": "makes its batches in a way of its own",
    "answered": "draws its responses in a way of its own",
    "responses": "draws its responses in a way of its own",
    "rewarded": "draws more when it has seen the first responses",
}


class PolicyGradient(SampledPolicyGradient):
    """The unified policy gradient estimator (Lv et al. 2025, arXiv:2509.04419), of any four parts.

    Responses are sampled, rewarded, and followed by

        gradient = mask · (pi / denominator) · A · grad log pi

    where each of the four is chosen by name and has settings of its own:
    `mask=ppo mask.clip_high=0.28 denominator=sampler advantage=bnpo gradient=sequence`. The
    published methods are such choices, most of them with one part of their own; a new one is often
    a configuration. Besides, token losses are added up by `aggregation`, a KL to the initial policy
    or to the sampler and an entropy bonus can be added, and rollouts can serve several steps
    (`epochs`, `minibatches`), come from an older policy (`sync_every`, `sync_delay`), as where
    sampling and training run side by side, or be joined by those of earlier steps, which keep the
    probabilities that they were sampled with (`replay`). With workers they are drawn ahead
    (`rollout.stale`), and what takes long can go on over several steps (`carry`): the old
    log-probabilities are then those that each token was sampled with.

    A subclass changes which prompts are sampled (`choose`), how (`sampled`), what responses are
    worth (`judge`), or which of them count (`selected`).
    """

    Config = RewardedPolicyGradientSettings
    recipe = {"precision": "auto", "learning_rate": 1e-6, "steps": 100}
    data_format: ClassVar[str | tuple[str, ...]] = "prompts"
    several_turns: ClassVar[bool] = True  # whether responses may have a tool in them
    draws_ahead = True
    config: RewardedPolicyGradientSettings

    def __init__(
        self,
        config: RewardedPolicyGradientSettings,
        place: Place,
        *,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        if config.tool.name != "none" and not self.several_turns:
            raise PostgradError(
                f"tool: this method writes responses in one turn: expected none, got "
                f"{config.tool.name!r}"
            )
        for key, value in (("rollout.stale", config.rollout.stale), ("carry", config.carry)):
            if value:
                self._require_older(config, key, value)
        self._require_carry(config)
        super().__init__(config, place, self.data_format, given, held_out_formats="prompts")
        self.reward = TaskReward(config, self.data, reward)
        self.tool = made_tool(config.tool)
        self.sampler: LaggingPolicy | None = None
        if config.sync_every > 1 or config.sync_delay > 0:
            self.sampler = LaggingPolicy(self.policy, config.sync_every, config.sync_delay)
        self.past = PastSamples(config.replay_steps) if config.replay else None
        self.ahead = Ahead(self.policy, self.policy.engine) if config.rollout.stale else None
        self.carried: CarriedGroups | None = None
        if config.carry:
            samples = config.rollout.samples
            self.carried = CarriedGroups(self.order.size, config.carry, samples)
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        if self.held_out is not None:
            self.held_out_prompts = render_prompts(self.policy, self.held_out, config, room)

    def check(self) -> None:
        self.reward.probe()

    def _require_older(self, config: RewardedPolicyGradientSettings, key: str, steps: int) -> None:
        """Stop where responses cannot be of weights of before, as `key` asks, or not be learnt."""
        rollout = config.rollout
        if config.tool.name != "none":
            raise not_older(key, steps, "has a tool answer between a response's turns")
        for name, reason in _OWN_WAYS.items():
            if getattr(type(self), name) is not getattr(PolicyGradient, name):
                raise not_older(key, steps, reason)
        if config.sync_every > 1 or config.sync_delay > 0:
            raise PostgradError(
                f"sync_every, sync_delay: with {key} the weights that draw are older already: "
                "expected 1 and 0"
            )
        for name, value, expected in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, 0)):
            if value != expected:
                raise PostgradError(
                    f"rollout.{name}: with {key} responses are corrected by the "
                    f"probabilities that they were sampled with, of all tokens: expected "
                    f"{expected}, got {value:g}"
                )

    def _require_carry(self, config: RewardedPolicyGradientSettings) -> None:
        """Stop at settings of carrying over that say nothing, or do not go together."""
        rollout, window = config.rollout, config.window
        if not config.carry:
            if window is not None:
                raise PostgradError(f"window: carry is 0: expected nothing, got {window}")
            return
        if rollout.stale:
            raise PostgradError(
                "carry: responses are carried over or drawn ahead, not both: expected 0 with "
                f"rollout.stale={rollout.stale}, got {config.carry}"
            )
        if rollout.stop:
            raise PostgradError(
                "rollout.stop: a stop string could lie across two windows of carry: expected "
                f"nothing, got {rollout.stop!r}"
            )
        if window is not None and window >= rollout.max_new_tokens:
            raise PostgradError(
                f"window: expected fewer than rollout.max_new_tokens, {rollout.max_new_tokens}, "
                f"got {window}"
            )

    def collect(self, step: int) -> Batch:
        if self.ahead is not None:
            self._draw_ahead(self.ahead, step)
        index = self.choose(step)
        with self.sampler.acting(step) if self.sampler is not None else nullcontext():
            batch = self.sampled(index, step)
            if self.ahead is not None or self.carried is not None:
                batch = batch.with_fields(old_logprobs=batch.sampled_logprobs)
            if self.past is not None:
                batch = self._with_past(batch, self.past)
            return self.learnable(batch)

    def _draw_ahead(self, ahead: Ahead, step: int) -> None:
        """Have workers draw for this step and `rollout.stale` more, if not yet asked."""
        ahead.begin(step)
        while ahead.next <= min(step + self.config.rollout.stale, self.place.steps - 1):
            ahead.ask(self._wanted(ahead.next), now=step)

    def _wanted(self, step: int) -> Wanted:
        """What a step draws, where it draws once."""
        rollout, index = self.config.rollout, self.choose(step)
        seeds = response_seeds(self.place.seed, len(index), rollout.samples, "rollout", step)
        return wanted(
            self.policy,
            [self.prompts[i] for i in index],
            rollout.sampling(),
            samples=rollout.samples,
            seeds=seeds,
        )

    def _with_past(self, fresh: Batch, past: PastSamples) -> Batch:
        """Fresh responses, and others of earlier steps with the probabilities they had then."""
        fresh = self.with_old_logprobs(fresh)
        random = generator(self.place.seed, "replay", int(fresh.step[0]))
        earlier = past.draw(self.config.replay, random)
        past.add(fresh)
        if earlier is None:
            return fresh
        return fresh.joined(earlier.with_fields(group=earlier.group + int(fresh.group.max()) + 1))

    @property
    def stale(self) -> bool:
        config = self.config
        lagging = config.sync_every > 1 or config.sync_delay > 0
        return lagging or config.replay > 0 or config.rollout.stale > 0 or config.carry > 0

    @property
    def needs_old_logprobs(self) -> bool:
        return self.stale or super().needs_old_logprobs

    def choose(self, step: int) -> list[int]:
        """The rows of data whose prompts are sampled in this step."""
        index: list[int] = self.order.indices(step).tolist()
        return index

    def sampled(self, index: list[int], step: int) -> Batch:
        """Rewarded responses to the prompts of rows `index`, those of one prompt together."""
        if self.carried is not None:
            return self._first_complete(self.carried, step)
        if self.ahead is None:
            return self.answered(index, step, "rollout", step)
        with timed("rollout"):
            rollouts = self.ahead.rollouts(step, self._wanted(step))
        return self._grouped(rollouts, index, step)

    def _first_complete(self, carried: CarriedGroups, step: int) -> Batch:
        """Rewarded responses to the prompts whose responses are complete first."""
        rollout = self.config.rollout
        with timed("rollout"):
            taken = carried.take(
                self.policy,
                lambda group: self.prompts[self.order.item(group)],
                rollout.sampling(),
                self.config.window or -(-rollout.max_new_tokens // 4),
                self.place.seed,
                step,
            )
        index = [self.order.item(group) for group in taken.groups]
        return self._grouped(taken.rollouts, index, step, begun=taken.begun)

    def answered(self, index: list[int], step: int, *stream: str | int) -> Batch:
        """Rewarded responses to the prompts of rows `index`, with the draws of the stream."""
        return self._grouped(self.responses(index, *stream), index, step)

    def _grouped(self, rollouts: Rollouts, index: list[int], step: int, **fields: Any) -> Batch:
        """Rewarded responses, as many to each prompt of rows `index`."""
        samples = self.config.rollout.samples
        row = torch.tensor(index).repeat_interleave(samples)
        group = torch.arange(len(index)).repeat_interleave(samples)
        return self.rewarded(rollouts, step, row=row, group=group, **fields)

    def responses(self, index: list[int], *stream: str | int) -> Rollouts:
        """Responses to the prompts of rows `index`, in several turns if there is a tool."""
        prompts = [self.prompts[i] for i in index]
        if self.tool is None:
            return self.roll_out(prompts, *stream)
        samples = range(self.config.rollout.samples)
        places = [(place, sample) for place in range(len(index)) for sample in samples]
        with timed("rollout"):
            return converse(
                self.policy,
                [prompts[place] for place, _ in places],
                [self.data.rows[index[place]] for place, _ in places],
                self.tool,
                self.config.rollout.sampling(),
                seeds=[derive(self.place.seed, *stream, *each) for each in places],
                max_turns=self.config.max_turns,
            )

    def rewarded(
        self, rollouts: Rollouts, step: int, *, row: Tensor, group: Tensor, **fields: Any
    ) -> Batch:
        """Rollouts with their rewards as a batch; `row` `[N]` is each one's place in the data."""
        reward, terms = self.judge([self.data.rows[i] for i in row.tolist()], rollouts)
        return rollout_batch(
            rollouts, step, group=group, row=row, reward=reward, terms=terms, **fields
        )

    def judge(
        self, rows: list[dict[str, Any]], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What responses to the prompts of N rows are worth `[N]`, and the terms of it `[N]`."""
        return self.reward.of(rows, rollouts)

    def learnable(self, batch: Batch) -> Batch:
        return super().learnable(self.selected(batch))

    def selected(self, batch: Batch) -> Batch:
        """What is learnt from; advantages are taken of this."""
        return batch

    def describe_batch(self, batch: Batch) -> Metrics:
        more = {}
        if self.ahead is not None:
            more["rollout/staleness"] = float(self.ahead.staleness(int(batch.step[0])))
        if self.past is not None:
            now = batch.step[0]
            more["replay/age"] = float((now - batch.step).float().mean())
            batch = batch.select((batch.step == now).nonzero().squeeze(1))
        if self.carried is not None:
            age = (batch.step - batch.begun).float()
            more |= {
                "rollout/staleness": float(age.mean()),
                "rollout/carried": float((age > 0).float().mean()),
            }
        described = {**super().describe_batch(batch), **more}
        if self.config.rollout.samples == 1:
            return described
        groups = [batch.reward[batch.group == group] for group in batch.group.unique()]
        degenerate = sum(bool((group == group[0]).all()) for group in groups) / len(groups)
        return {**described, "reward/degenerate_groups": degenerate}

    def state_dict(self) -> dict[str, Any]:
        others = {
            "sampler": self.sampler,
            "past": self.past,
            "ahead": self.ahead,
            "carried": self.carried,
        }
        kept = {name: other.state_dict() for name, other in others.items() if other is not None}
        return {**super().state_dict(), **kept}

    def changing_state(self) -> dict[str, Any]:
        """All but what workers are drawing, for which one would have to wait."""
        ahead, self.ahead = self.ahead, None
        try:
            return self.state_dict()
        finally:
            self.ahead = ahead

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.sampler is not None:
            self.sampler.load_state_dict(state["sampler"])
        if self.past is not None:
            self.past.load_state_dict(state["past"])
        if self.ahead is not None:
            self.ahead.load_state_dict(state["ahead"])
        if self.carried is not None:
            self.carried.load_state_dict(state["carried"])

    def evaluate(self) -> Metrics:
        """Mean reward of greedy completions on held-out prompts."""
        if self.held_out is None:
            return {}
        greedy = self.config.rollout.sampling(temperature=0.0)
        prompts, rows = self.held_out_prompts, self.held_out.rows
        seeds = [0] * len(rows)
        if self.tool is None:
            rollouts = generate(self.policy, prompts, greedy, seeds=seeds)
        else:
            turns = self.config.max_turns
            rollouts = converse(
                self.policy, prompts, rows, self.tool, greedy, seeds=seeds, max_turns=turns
            )
        return self.reward.measured(rows, rollouts)
