"""Methods that learn from preferences between their own samples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.pairing import best_and_worst, win_rates
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import (
    Given,
    LanguageSettings,
    RolloutSettings,
    draw_responses,
    find_materials,
    render_prompts,
)
from postgrad.methods.language.comparisons import (
    Compared,
    compared,
    comparison_batch,
    comparison_metrics,
    known_logprobs,
)
from postgrad.methods.language.frontier import Frontier, FrontierSettings
from postgrad.rewards import RewardSpec
from postgrad.rewards.preferences import load_preference, preference_matrices
from postgrad.sampling.generation import Rollouts
from postgrad.seeding import generator
from postgrad.timing import timed


class OnlineSettings(LanguageSettings):
    """Settings of the methods that compare their own samples."""

    data: DataSettings = setting(DataSettings(name="reasoning-gym/chain_sum"), "prompts")
    rollout: RolloutSettings = setting(RolloutSettings(samples=2), "how the policy is sampled")
    preference: RewardSpec | None = setting(
        None, "what compares two responses: module:function or file.py:function"
    )
    reward: list[RewardSpec] | RewardSpec | None = setting(
        None, "in place of a preference: a reward, whose Bradley-Terry probabilities are used; the "
        "data's own verifier when both are empty"
    )  # fmt: skip
    preference_scale: float = setting(1.0, "what reward gaps are divided by", gt=0)
    reward_time_limit: float = setting(60.0, "seconds a reward call may take", gt=0)
    beta: float = setting(0.1, "strength of the KL to the reference", gt=0)
    epochs: int = setting(1, "passes over the samples of a step", gt=0)
    minibatches: int = setting(1, "optimiser steps a pass", gt=0)
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


class OnlinePreference(Method):
    """Samples, has its samples compared and learns from the comparisons.

    A subclass fills `losses`; `choose` says which of a group's samples are compared, unless they
    are compared with those of an opponent by a `collect` of its own. One collected batch may be
    learnt from in several optimiser steps (`epochs`, `minibatches`): a step of the loop is then
    one round of an iterative method, and the policy that sampled is its centre.
    """

    recipe = {
        "precision": "auto",
        "learning_rate": 1e-6,
        "clip_norm": 10.0,
        "warmup_steps": 10,
        "steps": 100,
    }
    needs_centre: ClassVar[bool] = False  # log-probabilities of the policy that sampled
    least_samples: ClassVar[int] = 2  # to a prompt
    config: OnlineSettings

    def __init__(
        self,
        config: OnlineSettings,
        place: Place,
        *,
        preference: Any = None,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        super().__init__(config, place)
        if config.rollout.samples < self.least_samples:
            raise PostgradError(
                f"rollout.samples: a comparison needs at least {self.least_samples} samples a "
                f"prompt, got {config.rollout.samples}"
            )
        if config.minibatches > config.batch_size:
            raise PostgradError(
                f"minibatches: {config.minibatches} optimiser steps cannot share the prompts of a "
                f"batch_size of {config.batch_size}: at most one step a prompt"
            )
        found = find_materials(config, place, "prompts", given)
        self.policy, self.data, self.order = found.policy, found.data, found.order
        preference = config.preference if preference is None else preference
        reward = config.reward if reward is None else reward
        self.preference = load_preference(
            preference,
            found.data.verifier if preference is None and reward is None else reward,
            scale=config.preference_scale,
            time_limit=config.reward_time_limit,
        )
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        self.policy.freeze_reference()
        self.frontier = Frontier.of(config, config.frontier, found, place, self.preference)

    def losses(self, found: Compared) -> Tensor:
        """The loss `[B]` of each comparison, unless `loss` is the subclass's own."""
        raise NotImplementedError

    @property
    def temperature(self) -> float:
        """That of the policy which is learnt: the one it was sampled at."""
        return self.config.rollout.temperature

    def choose(self, preferences: Tensor) -> list[list[int]]:
        """The comparisons learnt from, best first, of a group's P(i over j) `[K, K]`."""
        return [best_and_worst(preferences)]

    def check(self) -> None:
        self.preference.probe(self.data.rows[0])

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def roll_out(self, prompts: list[Tensor], *stream: str | int, **changes: Any) -> Rollouts:
        """Responses of the policy, with the run's seed (see `draw_responses`)."""
        return draw_responses(
            self.policy, prompts, self.config.rollout, self.place.seed, *stream, **changes
        )

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step).tolist()
        rollouts = self.roll_out([self.prompts[i] for i in index], "rollout", step)
        size = self.config.rollout.samples
        texts = [rollouts.texts[i : i + size] for i in range(0, len(rollouts.texts), size)]
        with timed("reward"):
            preferences = preference_matrices(
                self.preference, [self.data.rows[i] for i in index], texts
            )
        chosen = [
            (number, places)
            for number, matrix in enumerate(preferences)
            for places in self.choose(matrix)
        ]
        scores = [win_rates(matrix) for matrix in preferences]
        batch = comparison_batch(
            [self.prompts[index[number]] for number, _ in chosen],
            [[rollouts.responses[number * size + i] for i in places] for number, places in chosen],
            torch.stack([scores[number][places] for number, places in chosen]).float(),
            group=torch.tensor([number for number, _ in chosen]),
            unlike=torch.tensor([len(set(texts[number])) > 1 for number, _ in chosen]),
            finished=torch.stack(
                [
                    rollouts.finished[[number * size + i for i in places]]
                    for number, places in chosen
                ]
            ),
            step=torch.full((len(chosen),), step),
        )
        return self.with_known(batch)

    def with_known(self, batch: Batch) -> Batch:
        """The batch with the log-probabilities that stay fixed while it is learnt from."""
        with self.policy.reference():
            known = {"reference": known_logprobs(self.policy, batch, self.temperature)}
        if self.needs_centre:
            known["centre"] = known_logprobs(self.policy, batch, self.temperature)
        return batch.with_fields(**known)

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """Whole prompts' comparisons, shuffled anew in every epoch."""
        if self.config.epochs * self.config.minibatches == 1:
            yield batch
            return
        groups = batch.group.unique()
        for epoch in range(self.config.epochs):
            random = generator(self.place.seed, "minibatches", int(batch.step[0]), epoch)
            order = groups[torch.randperm(len(groups), generator=random)]
            for part in order.tensor_split(min(self.config.minibatches, len(order))):
                yield batch.select(torch.isin(batch.group, part).nonzero().squeeze(1))

    def compared(self, batch: Batch) -> Compared:
        """The batch under the policy."""
        others = ("centre",) if self.needs_centre else ()
        return compared(self.policy, batch, others, self.temperature)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        found = self.compared(batch)
        value = self.losses(found).sum() / batch.items
        return value, comparison_metrics(self.config.beta * found.log_ratio, found)

    def describe_batch(self, batch: Batch) -> Metrics:
        return {
            "win_rate/best": float(batch.scores[:, 0].mean()),
            "win_rate/gap": float((batch.scores[:, 0] - batch.scores[:, -1]).mean()),
            "response/length": float(batch.lengths.float().mean()),
            "response/truncated": float((~batch.finished).float().mean()),
            "response/all_alike": float((~batch.unlike).float().mean()),
        }

    def evaluate(self) -> Metrics:
        """On held-out prompts: win rate against the reference, KL to it, and reward if known."""
        return self.frontier.measure(self.policy) if self.frontier is not None else {}

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.policy.decode(batch.prompts[i]),
                "chosen": self.policy.decode(batch.responses[i][0]),
                "rejected": self.policy.decode(batch.responses[i][-1]),
                "win rate of chosen": float(batch.scores[i, 0]),
                "win rate of rejected": float(batch.scores[i, -1]),
            }
            for i in range(min(len(batch), 4))
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
