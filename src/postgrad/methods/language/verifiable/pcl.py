"""Prompt Curriculum Learning."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.language.base import Given, RolloutSettings
from postgrad.methods.language.comparisons import SCORING_TOKENS
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.sampling.epochs import Epochs
from postgrad.sampling.prompt_choice import nearest_to
from postgrad.seeding import generator


class PCLSettings(RewardedPolicyGradientSettings):
    """Settings of prompt curriculum learning."""

    pool_factor: int = setting(
        4, "k: prompts that are looked at for each one that is sampled", gt=0, source="paper"
    )
    target: float = setting(
        0.5, "tau: the success rate that is sought, 0 and 1 being the ends of reward_range",
        gt=0, lt=1, source="paper",
    )  # fmt: skip
    reward_range: tuple[float, float] = setting((0.0, 1.0), "least and greatest possible reward")
    uniform_share: float = setting(
        0.0, "of a step's prompts that are drawn whatever their value, so that the value model "
        "sees all kinds", ge=0, lt=1,
    )  # fmt: skip
    value_rate: float = setting(
        10.0, "the value model's learning rate, in multiples of the policy's (uncertain)", gt=0
    )
    batch_size: int = setting(32, "m: prompts a step that are sampled (paper: 512)", gt=0)
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=16), "how the policy is sampled", source="paper"
    )
    advantage: AdvantageChoice = setting("centred", "from rewards to advantages", source="paper")
    mask: MaskChoice = setting("none", "which tokens teach", source="paper")
    aggregation: Aggregation = setting(
        "sequence-mean", "how token losses become one", source="paper"
    )


class PCL(PolicyGradient):
    """Prompt Curriculum Learning (Gao et al. 2025, arXiv:2510.01135).

    The prompts that teach most are those that the policy solves half of the time: few groups are
    all right or all wrong, and gradients are large. A value model V learns to say from the prompt
    alone, without a rollout, how often the policy succeeds; of k m candidates the m whose value is
    nearest to tau are sampled.

        D   = the m prompts of the pool with the smallest |V(x) - tau|
        J   = E[1/|y| sum_t pi(y_t)/pi_t(y_t) A],    A = r(x, y) - mean_j r(x, y_j)
        L_V = mean_x (V(x) - mean_j r(x, y_j))^2     with the same rollouts, after the policy's step

    V is a copy of the policy's body with a linear head at the prompt's last token, and shares
    nothing with the policy. Its output is not squashed (uncertain), but clipped to the range of
    rewards where prompts are chosen; ties are broken at random. It starts from the mean reward of
    the first rollouts, so the first choice is random. Prompts that were not chosen come again in a
    later pass over the data. Learning rates are not known from the paper.
    """

    Config = PCLSettings
    config: PCLSettings

    def __init__(
        self, config: PCLSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        low, high = config.reward_range
        if low >= high:
            raise PostgradError(f"reward_range: must rise, got {low:g} to {high:g}")
        super().__init__(config, place, reward=reward, **given)
        if config.batch_size > len(self.data):
            raise PostgradError(
                f"batch_size: {config.batch_size} prompts cannot be chosen among the "
                f"{len(self.data)} of {self.data.name}"
            )
        self.order = Epochs(len(self.data), config.pool_factor * config.batch_size, place.seed)
        self.values = ScalarModel.on_body_of(self.policy)
        self._level: float | None = None  # where V starts from
        self._expected = torch.zeros(0)  # V of the prompts of this step

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), "values": self.values}

    def rates(self) -> dict[str, float]:
        return {"values": self.config.value_rate}

    def choose(self, step: int) -> list[int]:
        pool = self.order.indices(step)
        expected = self._values([self.prompts[i] for i in pool.tolist()])
        low, high = self.config.reward_range
        random = generator(self.place.seed, "prompts", step)
        count = self.config.batch_size
        nearest = count - int(self.config.uniform_share * count)
        chosen = nearest_to(
            expected.clamp(low, high), low + self.config.target * (high - low), nearest, random
        )
        others = torch.ones(len(pool), dtype=torch.bool)
        others[chosen] = False
        rest = others.nonzero().squeeze(1)
        drawn = rest[torch.randperm(len(rest), generator=random)[: count - nearest]]
        chosen = torch.cat([chosen, drawn])
        self._expected = expected[chosen]
        index: list[int] = pool[chosen].tolist()
        return index

    @torch.no_grad()
    def _values(self, prompts: list[Tensor]) -> Tensor:
        """V of prompts `[P]`, not clipped."""
        batch = Batch(prompts=prompts, cost=[len(prompt) for prompt in prompts])
        return torch.cat([self._read(part).cpu() for part in batch.split(SCORING_TOKENS)])

    def _read(self, batch: Batch) -> Tensor:
        nothing = [prompt[:0] for prompt in batch.prompts]
        return (self._level or 0.0) + self.values.rewards(batch.prompts, nothing)

    def sampled(self, index: list[int], step: int) -> Batch:
        batch = super().sampled(index, step)
        low, high = self.config.reward_range
        if bool(((batch.reward < low) | (batch.reward > high)).any()):
            raise PostgradError(
                f"reward_range: rewards must lie between {low:g} and {high:g}, got "
                f"{float(batch.reward.min()):g} to {float(batch.reward.max()):g}"
            )
        samples = self.config.rollout.samples
        return batch.with_fields(expected=self._expected.repeat_interleave(samples))

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        metrics = super().update(batch, optimise)
        if self._level is None:
            self._level = float(batch.reward.mean())
        value = optimise(self.value_loss, _by_prompt(batch), "values")
        return metrics | {"value/loss": value["loss"]}

    def value_loss(self, prompts: Batch) -> tuple[Tensor, Metrics]:
        """The value model's: squared errors to the mean rewards of prompts."""
        values = self._read(prompts)
        return (values - prompts.target.to(values)).square().sum() / prompts.items, {}

    def describe_batch(self, batch: Batch) -> Metrics:
        prompts = _by_prompt(batch)
        low, high = self.config.reward_range
        target = low + self.config.target * (high - low)
        error = prompts.expected - prompts.target
        return {
            **super().describe_batch(batch),
            "value/mean": float(prompts.expected.mean()),
            "value/distance": float((prompts.expected - target).abs().mean()),
            "value/error": float(error.square().mean().sqrt()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "level": self._level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._level = state["level"]


def _by_prompt(batch: Batch) -> Batch:
    """The prompts of a step, each once: with the mean reward `target` `[P]`, and what of it was
    `expected` `[P]`."""
    batch = batch.select((batch.step == batch.step[0]).nonzero().squeeze(1))  # nothing replayed
    groups = batch.group.unique()
    first = torch.stack([(batch.group == group).nonzero()[0, 0] for group in groups])
    prompts = [batch.prompts[i] for i in first.tolist()]
    return Batch(
        prompts=prompts,
        cost=[len(prompt) for prompt in prompts],
        target=torch.stack([batch.reward[batch.group == group].mean() for group in groups]),
        expected=batch.expected[first],
    )
