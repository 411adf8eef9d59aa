"""RLGF: a guide begins responses that the policy ends, or ends what the policy began."""

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.roll_in import Scheme, roll_in_lengths, roll_in_masks
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Optimise, Place
from postgrad.methods.language.base import Given, RolloutSettings
from postgrad.methods.language.rlhf.actor_critic import ActorCritic, ActorCriticSettings
from postgrad.models.language import LanguagePolicy
from postgrad.rewards.running import attempt
from postgrad.sampling.generation import Rollouts, SamplingSettings
from postgrad.sampling.roll_in import Continue, PolicySpeaker, Speaker, TextSpeaker
from postgrad.seeding import derive, generator
from postgrad.timing import timed


class RLGFSettings(ActorCriticSettings):
    """Settings of RLGF: those of PPO, and the guide's."""

    guide: str | None = setting(
        None, "folder or Hub id of the guide, a language model of the same tokens as the policy"
    )
    scheme: Literal["ppo++", "aggrevated", "lols", "d2lols"] = setting(
        "ppo++", "ppo++: the guide begins; aggrevated: the guide ends; lols: one of them at random "
        "in every step; d2lols: first the second, then the first"
    )  # fmt: skip
    roll_in: float = setting(
        0.8, "beta: share of responses with a roll-in", ge=0, le=1, source="official code"
    )
    ppo_share: float = setting(
        0.8, "tau of lols: share of ppo++ steps", ge=0, le=1, source="official code"
    )
    switch_step: int = setting(
        20, "tau of d2lols: steps of aggrevated before those of ppo++", ge=0,
        source="official code, IMDB",
    )  # fmt: skip
    last_only: bool = setting(
        False, "aggrevated learns from the last token before the guide alone, as the paper has it",
        source="official code",
    )  # fmt: skip
    guide_temperature: float = setting(1.0, "the guide's sampling temperature", gt=0)
    guide_top_p: float = setting(
        0.92, "nucleus that the guide is sampled from", gt=0, le=1, source="official code"
    )
    supervised_weight: float = setting(
        0.1, "of the likelihood of the data's own completions in the loss", ge=0,
        source="official code",
    )  # fmt: skip
    batch_size: int = setting(128, "prompts a step", gt=0, source="official code, CommonGen")
    epochs: int = setting(4, "passes over the rollouts of a step", gt=0, source="official code")
    minibatches: int = setting(4, "optimiser steps a pass", gt=0, source="official code")
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=1, max_new_tokens=48), "how the policy is sampled"
    )
    discount: float = setting(0.99, "gamma", gt=0, le=1, source="official code")
    standardise: bool = setting(
        False, "advantages to mean 0, deviation 1 over a batch's tokens", source="official code"
    )
    kl_coefficient: float = setting(
        0.0, "of the KL to the reference, in the reward of the policy's tokens", ge=0,
        source="official code",
    )  # fmt: skip


class RLGF(ActorCritic):
    """Reinforcement learning with guided feedback (Chang et al. 2023, arXiv 2306.11816).

    Text can be continued from any beginning, so a guide, a better but dearer or closed model, can
    show the policy good places to start from, or how well it would itself go on. With h drawn
    evenly from {1, ..., L - 1}, in a share beta of the responses:

        PPO++       y_<=h from the guide, the rest from the policy
        AggreVaTeD  y_<=h from the policy, the rest from the guide
        LOLS        a step of PPO++ with probability tau, else of AggreVaTeD
        D2LOLS      AggreVaTeD for the first tau steps, then PPO++

        L = PPO's loss over the policy's tokens - c mean log pi(y*_t | x, y*_<t)

    with advantages by GAE over whole responses and y* the data's own completions (the columns
    `completion` or `answer`). Nothing but samples of the guide is used. In AggreVaTeD the critic
    learns from the guide's tokens alone, so that it says what the guide would make of a state; LOLS
    and D2LOLS have a second critic for that, in their steps of AggreVaTeD.

    From Python, `guide` may be a policy, or a function of texts `guide(prompts, beginnings)` that
    returns what comes next: its words become tokens of the policy.

    As in the authors' code, AggreVaTeD updates all of the policy's tokens by GAE; the paper updates
    the action before the guide takes over (`last_only`). Departures: the masks of AggreVaTeD hold
    in the steps of LOLS and D2LOLS too, where the released code swaps them; no KL is taken off the
    reward unless `kl_coefficient` asks for it (uncertain in the paper for PPO++), and then only of
    the policy's own tokens; critic and policy are two networks with two optimisers, so there is
    no weight of the value loss.
    """

    Config = RLGFSettings
    recipe = {**ActorCritic.recipe, "learning_rate": 5e-6, "schedule": "linear"}
    parts = FourParts(
        mask="the policy's own tokens, and PPO's clip",
        denominator="the policy, at its own tokens of responses that the guide began or ended",
        advantage="GAE(gamma, lambda) over the whole response; a critic of the guide in AggreVaTeD",
        gradient="token log-likelihood ratio, and the likelihood of the data's completions",
    )
    config: RLGFSettings

    def __init__(
        self,
        config: RLGFSettings,
        place: Place,
        *,
        reward: Any = None,
        guide: LanguagePolicy | Continue | None = None,
        **given: Unpack[Given],
    ):
        super().__init__(config, place, reward=reward, **given)
        if config.scheme == "d2lols" and config.switch_step >= place.steps:
            warnings.warn(
                f"switch_step: {config.switch_step} of {place.steps} steps come before PPO++, "
                "which never begins",
                stacklevel=2,
            )
        self._own = PolicySpeaker(self.policy, config.rollout.sampling())
        self._guide = self._find_guide(guide)
        self._completions = self._find_completions() if config.supervised_weight else []
        both = config.scheme in ("lols", "d2lols")
        self.guide_critic = self._find_critic() if both else None

    def _find_guide(self, given: LanguagePolicy | Continue | None) -> Speaker:
        config = self.config
        most = config.rollout.max_new_tokens
        if given is not None and not isinstance(given, LanguagePolicy):
            return TextSpeaker(_in_one_line(given), self.policy, most)
        guide = self.other_policy("guide", config.guide, given)
        settings = SamplingSettings(most, config.guide_temperature, config.guide_top_p)
        return PolicySpeaker(guide, settings)

    def _find_completions(self) -> list[Tensor]:
        most = self.config.rollout.max_new_tokens
        found = []
        for number, row in enumerate(self.data.rows):
            text = row.get("completion", row.get("answer"))
            if text is None:
                raise PostgradError(
                    f"supervised_weight: {self.data.where(number)} has neither completion nor "
                    "answer to learn from: set it to 0 to do without"
                )
            found.append(self.policy.encode_response(str(text))[:most])
        return found

    def modules(self) -> dict[str, nn.Module]:
        more = {} if self.guide_critic is None else {"guide_critic": self.guide_critic}
        return {**super().modules(), **more}

    def rates(self) -> dict[str, float]:
        return dict.fromkeys(("critic", "guide_critic"), self.config.critic_rate)

    def scheme(self, step: int) -> Scheme:
        """Who begins the responses of a step."""
        config = self.config
        if config.scheme == "lols":
            chance = torch.rand((), generator=generator(self.place.seed, "scheme", step))
            return "ppo++" if float(chance) < config.ppo_share else "aggrevated"
        if config.scheme == "d2lols":
            return "aggrevated" if step < config.switch_step else "ppo++"
        return config.scheme

    def responses(self, index: list[int], step: int) -> tuple[Rollouts, dict[str, Any]]:
        samples = self.config.rollout.samples
        items = [(i, place, k) for place, i in enumerate(index) for k in range(samples)]
        guide_first = self.scheme(step) == "ppo++"
        speakers = (self._guide, self._own) if guide_first else (self._own, self._guide)

        def say(
            speaker: Speaker, places: list[int], beginnings: list[Tensor], stream: str
        ) -> Rollouts:
            several = [items[place] for place in places]
            seeds = [derive(self.place.seed, stream, step, place, k) for _, place, k in several]
            with timed("rollout"):
                return speaker(
                    [self.data.rows[i] for i, _, _ in several],
                    [self.prompts[i] for i, _, _ in several],
                    beginnings,
                    seeds,
                )

        random = generator(self.place.seed, "roll-in", step)
        chances, uniforms = torch.rand(2, len(items), generator=random, dtype=torch.float64)
        chosen = (chances < self.config.roll_in).nonzero().squeeze(1).tolist()
        nothing = self.prompts[0][:0]
        beginnings = [nothing] * len(items)
        roll_ins = torch.zeros(len(items), dtype=torch.long)
        if chosen:
            begun = say(speakers[0], chosen, [nothing] * len(chosen), "roll-in").responses
            lengths = torch.tensor([len(response) for response in begun])
            roll_ins[chosen] = roll_in_lengths(lengths, uniforms[chosen])
            for place, response in zip(chosen, begun, strict=True):
                beginnings[place] = response[: roll_ins[place]]
        rollouts = say(speakers[1], list(range(len(items))), beginnings, "rollout")
        fields: dict[str, Any] = {"roll_ins": roll_ins}
        if self._completions:
            fields["completions"] = [self._completions[i] for i, _, _ in items]
        return rollouts, fields

    def with_known(self, batch: Batch) -> Batch:
        batch = super().with_known(batch)
        own, _ = roll_in_masks(batch.mask, batch.roll_ins, self._scheme_of(batch))
        # the policy answers for the divergence of its own tokens only
        reference = torch.where(own, batch.reference_logprobs, batch.old_logprobs)
        return batch.with_fields(reference_logprobs=reference)

    def with_advantages(self, batch: Batch) -> Batch:
        batch = super().with_advantages(batch)
        policy, critic = roll_in_masks(
            batch.mask, batch.roll_ins, self._scheme_of(batch), self.config.last_only
        )
        return batch.with_fields(mask=policy, critic_mask=critic)

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        for part in super().minibatches(batch):
            if self._completions:
                tokens = sum(len(completion) for completion in part.completions)
                part = part.with_fields(completion_tokens=torch.full((len(part),), tokens))
            yield part

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(batch)
        if self._completions:
            logprobs = self.policy.score(batch.prompts, batch.completions).logprobs
            own = sum(len(completion) for completion in batch.completions)
            metrics["supervised/loss"] = -float(logprobs.detach().sum()) / own
            likelihood = logprobs.sum() / int(batch.completion_tokens[0])
            loss = loss - self.config.supervised_weight * likelihood
        return loss, metrics

    def learn_values(self, batch: Batch, optimise: Optimise) -> Metrics:
        learns = batch.with_fields(mask=batch.critic_mask)
        return optimise(self.value_loss, learns, self._critic_of(batch))

    def _values(self, batch: Batch) -> Tensor:
        critic: Any = self.modules()[self._critic_of(batch)]
        values: Tensor = critic.values(batch.prompts, batch.responses)
        return values

    def _critic_of(self, batch: Batch) -> str:
        of_guide = self.guide_critic is not None and self._scheme_of(batch) == "aggrevated"
        return "guide_critic" if of_guide else "critic"

    def _scheme_of(self, batch: Batch) -> Scheme:
        return self.scheme(int(batch.step[0]))

    def describe_batch(self, batch: Batch) -> Metrics:
        own = batch.mask
        return {
            **super().describe_batch(batch.with_fields(mask=batch.critic_mask)),
            "response/entropy": float(-batch.old_logprobs[own].mean()) if own.any() else 0.0,
            "advantage/spread": float(batch.advantages[own].std(correction=0))
            if own.any()
            else 0.0,
            "roll_in/length": float(batch.roll_ins.float().mean()),
            "roll_in/guide_begins": float(self._scheme_of(batch) == "ppo++"),
        }


def _in_one_line(guide: Continue) -> Continue:
    """The user's guide, whose errors become one line."""
    code = getattr(guide, "__code__", None)
    file = code.co_filename if code else None

    def call(prompts: list[Any], beginnings: list[str]) -> list[str]:
        return attempt(partial(guide, prompts, beginnings), "guide", own_file=file)

    return call
