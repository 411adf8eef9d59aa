"""Methods that learn from preferences between their own samples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.pairing import best_and_worst, win_rates
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, NothingToLearn, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import (
    Given,
    LanguageSettings,
    RolloutSettings,
    draw_responses,
    find_materials,
    prompt_minibatches,
    render_prompts,
    require_minibatches,
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
from postgrad.rewards.comparing import COMPARE, ModelJudge
from postgrad.rewards.preferences import Noisy, Preference, load_preference, preference_matrices
from postgrad.sampling.chat import ChatSettings, load_chat
from postgrad.sampling.generation import Rollouts
from postgrad.tasks import Examples
from postgrad.timing import timed


class JudgedSettings(LanguageSettings):
    """Settings of every method whose samples are compared by a preference.

    `data.flip_rate` is the share of verdicts that are turned round.
    """

    flips_verdicts = True

    data: DataSettings = setting(DataSettings(name="reasoning-gym/chain_sum"), "prompts")
    preference: RewardSpec | None = setting(
        None, "what compares two responses: module:function or file.py:function"
    )
    judge: ChatSettings | None = setting(
        None, "language model that compares, in place of a function: here or on a server"
    )
    judge_instruction: str = setting(
        COMPARE, "what it is asked, with {prompt}, {first} and {second} in it"
    )
    reward: list[RewardSpec] | RewardSpec | None = setting(
        None, "in place of a preference: a reward, whose Bradley-Terry probabilities are used; the "
        "data's own verifier when all are empty"
    )  # fmt: skip
    preference_scale: float = setting(1.0, "what reward gaps are divided by", gt=0)
    reward_time_limit: float = setting(60.0, "seconds a reward call may take", gt=0)
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


def find_preference(
    config: JudgedSettings, place: Place, data: Examples, preference: Any, reward: Any
) -> Preference:
    """What was passed from Python, or what `config` names, or the data's own verifier.

    Raises:
        PostgradError: several or nothing is named.
    """
    preference = config.preference if preference is None else preference
    if config.judge is not None:
        if preference is not None:
            raise PostgradError("judge: give either preference or judge, not both")
        preference = ModelJudge(load_chat(config.judge, place.device), config.judge_instruction)
    reward = config.reward if reward is None else reward
    found = load_preference(
        preference,
        data.verifier if preference is None and reward is None else reward,
        scale=config.preference_scale,
        time_limit=config.reward_time_limit,
    )
    rate = config.data.flip_rate
    return Noisy(found, rate, place.seed) if rate else found


def require_samples(rollout: RolloutSettings, least: int = 2) -> None:
    """Stop at a group that is too small to be compared."""
    if rollout.samples < least:
        raise PostgradError(
            f"rollout.samples: a comparison needs at least {least} samples a prompt, got "
            f"{rollout.samples}"
        )


class OnlineSettings(JudgedSettings):
    """Settings of the methods that compare their own samples."""

    rollout: RolloutSettings = setting(RolloutSettings(samples=2), "how the policy is sampled")
    beta: float = setting(0.1, "strength of the KL to the reference", gt=0)
    epochs: int = setting(1, "passes over the samples of a step", gt=0)
    minibatches: int = setting(1, "optimiser steps a pass", gt=0)


@dataclass(frozen=True)
class Response:
    """One of the responses to a prompt that are compared; `own` if the policy sampled it."""

    text: str
    tokens: Tensor
    finished: bool
    own: bool

    @classmethod
    def sampled(cls, rollouts: Rollouts, places: Iterable[int]) -> list[Self]:
        return [
            cls(rollouts.texts[i], rollouts.responses[i], bool(rollouts.finished[i]), True)
            for i in places
        ]


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
        require_samples(config.rollout, self.least_samples)
        require_minibatches(config.minibatches, config.batch_size)
        found = find_materials(config, place, "prompts", given, corrected=True)
        self.policy, self.data, self.order = found.policy, found.data, found.order
        self.preference = find_preference(config, place, found.data, preference, reward)
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        self.policy.freeze_reference()
        self.frontier = Frontier.of(config, config.frontier, found, place, self.preference)

    def losses(self, found: Compared) -> Tensor:
        """The loss `[B]` of each comparison, unless `loss` is the subclass's own."""
        raise NotImplementedError

    @property
    def scoring_temperature(self) -> float:
        """The temperature of the log-probabilities: that which the responses were sampled at."""
        return self.config.rollout.temperature

    def implicit_rewards(self, found: Compared) -> Tensor:
        """What the policy thinks of the responses, `[B, K]`: for metrics."""
        return self.config.beta * found.log_ratio

    def choose(self, preferences: Tensor) -> list[list[int]]:
        """The comparisons learnt from, best first, of a group's P(i over j) `[K, K]`."""
        return [best_and_worst(preferences)]

    def verdicts(self, preferences: list[Tensor], step: int) -> list[Tensor]:
        """What `choose` sees of the groups' P(i over j); by default the probabilities."""
        return preferences

    def given_responses(self, row: dict[str, Any]) -> list[str]:
        """What is compared besides the samples of a row's prompt: the last places of its group."""
        return []

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
        groups = [
            Response.sampled(rollouts, range(number * size, (number + 1) * size))
            + self._given(self.data.rows[i])
            for number, i in enumerate(index)
        ]
        return self.with_known(self.judged(index, groups, step))

    def _given(self, row: dict[str, Any]) -> list[Response]:
        room = self.config.rollout.max_new_tokens
        made = []
        for text in self.given_responses(row):
            tokens = self.policy.encode_response(text)
            kept = tokens[:room]
            made.append(Response(self.policy.decode(kept), kept, len(kept) == len(tokens), False))
        return made

    def judged(self, index: list[int], groups: list[list[Response]], step: int) -> Batch:
        """The comparisons that `choose` makes of groups of responses to the prompts `index`."""
        with timed("reward"):
            preferences = preference_matrices(
                self.preference,
                [self.data.rows[i] for i in index],
                [[one.text for one in group] for group in groups],
            )
        chosen = [
            (number, places)
            for number, matrix in enumerate(self.verdicts(preferences, step))
            for places in self.choose(matrix)
        ]
        if not chosen:
            raise NothingToLearn(
                f"no comparison is left: none of the {len(groups)} groups of "
                f"{len(groups[0])} responses has one that this method learns from"
            )
        scores = [win_rates(matrix) for matrix in preferences]
        members = [[groups[number][i] for i in places] for number, places in chosen]
        unlike = [len({one.text for one in group}) > 1 for group in groups]
        return comparison_batch(
            [self.prompts[index[number]] for number, _ in chosen],
            [[one.tokens for one in several] for several in members],
            torch.stack([scores[number][places] for number, places in chosen]).float(),
            group=torch.tensor([number for number, _ in chosen]),
            unlike=torch.tensor([unlike[number] for number, _ in chosen]),
            finished=torch.tensor([[one.finished for one in several] for several in members]),
            own=torch.tensor([[one.own for one in several] for several in members]),
            step=torch.full((len(chosen),), step),
        )

    def with_known(self, batch: Batch) -> Batch:
        """The batch with the log-probabilities that stay fixed while it is learnt from."""
        temperature = self.scoring_temperature
        with self.policy.reference():
            known = {"reference": known_logprobs(self.policy, batch, temperature)}
        if self.needs_centre:
            known["centre"] = known_logprobs(self.policy, batch, temperature)
        return batch.with_fields(**known)

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """Whole prompts' comparisons, shuffled anew in every epoch."""
        config = self.config
        return prompt_minibatches(batch, config.epochs, config.minibatches, self.place.seed)

    def compared(self, batch: Batch) -> Compared:
        """The batch under the policy."""
        others = ("centre",) if self.needs_centre else ()
        return compared(self.policy, batch, others, self.scoring_temperature)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        found = self.compared(batch)
        value = self.losses(found).sum() / batch.items
        return value, comparison_metrics(self.implicit_rewards(found), found)

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
