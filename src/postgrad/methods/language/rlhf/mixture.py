"""Reward models of groups of users who are not known: hard EM on language models."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.language.comparisons import (
    SCORING_TOKENS,
    comparison_batch,
    encoded_responses,
    pair_rows,
)
from postgrad.models.language import LanguagePolicy
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.mixture import (
    assign_users,
    em_reward_mixture,
    linear_reward,
    user_likelihoods,
)
from postgrad.objectives.pairwise import logistic
from postgrad.rewards.functions import RewardSet, Term
from postgrad.rewards.learned import LearnedReward
from postgrad.sampling.epochs import Epochs
from postgrad.seeding import derive, generator
from postgrad.tasks import Examples
from postgrad.timing import timed

_DECAY, _ROUNDS = 3.0, 20  # of the EM with linear rewards that the first groups come from


class MixtureSettings(Settings):
    """How reward models of several groups are learnt from pairs with a column `user`."""

    groups: int = setting(2, "groups of users, each with a reward model", gt=0, source="paper")
    rounds: int = setting(
        10, "rounds of EM: optimiser steps, then users are assigned anew", gt=0,
        source="official code",
    )  # fmt: skip
    start: Literal["states", "turns"] = setting(
        "states", "first groups: by EM with linear rewards of the policy's mean hidden states, "
        "which cannot memorise pairs (ours); or users in turn (official code)"
    )  # fmt: skip
    restarts: int = setting(10, "runs of that EM, of which the likeliest counts", gt=0)
    steps: int = setting(20, "optimiser steps of each reward model a round", gt=0)
    batch_size: int = setting(16, "pairs a step and reward model", gt=0)
    rate: float = setting(
        20.0, "the reward models' learning rate, in multiples of the policy's (2e-5 at 1e-6)",
        gt=0, source="official code",
    )  # fmt: skip


class RewardMixture:
    """Reward models of groups, learnt by hard EM over users (MaxMin-RLHF, arXiv:2402.08925).

    In every round each group's model learns from the pairs of its users, going on from where it
    was; then each user goes to the group under whose model all of their pairs together are
    likeliest:

        z_h = argmax_u sum_{pairs of h} log sigma(r_u(x, y_w) - r_u(x, y_l))
        L_u = mean of -log sigma(r_u(x, y_w) - r_u(x, y_l)) over pairs of the users with z_h = u

    A large model soon knows the pairs that it has learnt from by heart, and then keeps its users
    whoever they are. So the first groups come from the same EM with rewards that are linear in the
    mean hidden state of a response under the initial policy, with restarts (`start=turns`: users
    in turn). The models are trained by the run's own steps, the first `total` of them. A model
    that loses all its users stays as it is and is left out of what the groups are worth.
    """

    def __init__(
        self,
        body: LanguagePolicy,
        data: Examples,
        prompts: list[Tensor],
        config: MixtureSettings,
        limit: int,
        place: Place,
    ):
        self.config = config
        self.total = config.rounds * config.steps
        self.taken = 0  # steps
        self._seed = place.seed
        self._prompts = prompts
        self._responses = [
            encoded_responses(
                body,
                [row["chosen"], row["rejected"]],
                limit,
                "rollout.max_new_tokens",
                data.where(number),
            )
            for number, row in enumerate(data.rows)
        ]
        self.users, self._user_of = _users(data)
        if config.groups > len(self.users):
            raise PostgradError(
                f"em.groups: {data.name} has pairs of {len(self.users)} users, who cannot form "
                f"{config.groups} groups"
            )
        self._body = body  # at the start, which learns nothing while groups are looked for
        self.assignment = torch.arange(len(self.users)) % config.groups
        self.likelihood: float | None = None  # a user's, on average, at the last assignment
        self.models = {
            f"group-{number}": ScalarModel.on_body_of(body)
            for number in range(1, config.groups + 1)
        }
        for model in self.models.values():
            model.prompts_as_turns = data.chat and body.has_chat_template

    @property
    def learnt(self) -> bool:
        return self.taken >= self.total

    @property
    def inhabited(self) -> list[int]:
        """The groups that have users."""
        return self.assignment.unique().tolist()

    def rewards(self, time_limit: float) -> RewardSet:
        """What the models say, as reward functions by the groups' names."""
        functions = {name: LearnedReward(model) for name, model in self.models.items()}
        for model in self.models.values():
            model.requires_grad_(True)  # they are still to learn
        return RewardSet([Term(name, f) for name, f in functions.items()], time_limit)

    def collect(self, step: int) -> Batch:
        """Pairs for each group's model."""
        if step == 0 and self.config.start == "states" and self.config.groups > 1:
            self._start_from_states()
        round_, position = divmod(step, self.config.steps)
        chosen = []
        for group in self.inhabited:
            own = (self.assignment[self._user_of] == group).nonzero().squeeze(1)
            seed = derive(self._seed, "mixture", round_, group)
            chosen.append(own[Epochs(len(own), self.config.batch_size, seed).indices(position)])
        return self._batch(torch.cat(chosen))

    def _batch(self, index: Tensor) -> Batch:
        rows = index.tolist()
        return comparison_batch(
            [self._prompts[i] for i in rows],
            [self._responses[i] for i in rows],
            index=index,
            reward_group=self.assignment[self._user_of[index]],
        )

    @torch.no_grad()
    def _start_from_states(self) -> None:
        """The first groups, by EM on frozen features."""
        config = self.config
        everything = self._batch(torch.arange(len(self._prompts)))
        with timed("scoring"):
            parts = [_mean_states(self._body, p) for p in everything.split(SCORING_TOKENS)]
        states = torch.cat(parts)
        differences = states[:, 0] - states[:, 1]
        differences = differences / differences.std()
        found = em_reward_mixture(
            partial(linear_reward, differences, decay=_DECAY),
            lambda weights: differences @ weights,
            self._user_of,
            config.groups,
            rounds=_ROUNDS,
            restarts=config.restarts,
            generator=generator(self._seed, "mixture"),
        )
        self.assignment = found.assignment

    @torch.no_grad()
    def _assign(self) -> None:
        """The E-step."""
        everything = self._batch(torch.arange(len(self._prompts)))
        with timed("scoring"):
            margins = torch.stack(
                [
                    torch.cat([_margins(m, p).cpu() for p in everything.split(SCORING_TOKENS)])
                    for m in self.models.values()
                ]
            )
        found = user_likelihoods(margins.double(), self._user_of, len(self.users))
        self.assignment = assign_users(found)
        self.likelihood = float(found.amax(0).mean())

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        """One optimiser step of every group's model; the last of a round assigns users anew."""
        every = {}
        for group, (name, model) in enumerate(self.models.items()):
            own = (batch.reward_group == group).nonzero().squeeze(1)
            if len(own):
                every[name] = optimise(partial(_loss, model), batch.select(own), name)
        self.taken += 1
        if self.taken % self.config.steps == 0:
            with optimise.autocast():
                self._assign()
        shown = ("loss", "accuracy", "gradient_norm")
        means = {key: sum(m[key] for m in every.values()) / len(every) for key in shown}
        return means | {f"loss/{name}": metrics["loss"] for name, metrics in every.items()}

    def describe(self) -> Metrics:
        counts = torch.bincount(self.assignment, minlength=self.config.groups).tolist()
        metrics = {f"users/{name}": float(n) for name, n in zip(self.models, counts, strict=True)}
        if self.likelihood is not None:
            metrics["likelihood"] = self.likelihood
        return metrics

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        model = next(iter(self.models.values()))
        names, groups = list(self.models), batch.reward_group.tolist()
        rows = pair_rows(model, batch)
        return [{**row, "group": names[group]} for row, group in zip(rows, groups, strict=False)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "assignment": self.assignment,
            "likelihood": self.likelihood,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken, self.likelihood = state["taken"], state["likelihood"]
        self.assignment = state["assignment"].clone()

    def save(self, folder: Path) -> None:
        """Write each group's reward model, and who belongs to it."""
        for name, model in self.models.items():
            model.save(folder / name)
        names = list(self.models)
        groups = {user: names[group] for user, group in self.groups_of_users()}
        text = json.dumps(groups, indent=1, ensure_ascii=False)
        (folder / "groups.json").write_text(text, encoding="utf-8")

    def groups_of_users(self) -> Iterator[tuple[str, int]]:
        """Each user, and the number of their group."""
        yield from zip(self.users, self.assignment.tolist(), strict=True)


def _users(data: Examples) -> tuple[list[str], Tensor]:
    """The users by name in the order of appearance, and the number of each pair's `[N]`."""
    numbers: dict[str, int] = {}
    found = []
    for place, row in enumerate(data.rows):
        user = row.get("user")
        if user is None or not str(user).strip():
            raise PostgradError(
                f"{data.where(place)}: column 'user' is missing or empty: groups are learnt from "
                "pairs whose annotators are known (or name a reward for each group)"
            )
        found.append(numbers.setdefault(str(user), len(numbers)))
    return list(numbers), torch.tensor(found)


def _mean_states(policy: LanguagePolicy, batch: Batch) -> Tensor:
    """The mean last hidden state of every response of pairs, `[B, 2, d]`, float64 on the CPU."""
    prompts = [prompt for prompt in batch.prompts for _ in range(2)]
    responses = [one for pair in batch.responses for one in pair]
    states = policy.embed(prompts, responses, skip=[len(prompt) for prompt in prompts])
    return states.double().cpu().view(len(batch), 2, -1)


def _margins(model: ScalarModel, batch: Batch) -> Tensor:
    """r(x, y_w) - r(x, y_l) of pairs `[B]`."""
    prompts = [prompt for prompt in batch.prompts for _ in range(2)]
    rewards = model.rewards(prompts, [one for pair in batch.responses for one in pair])
    return rewards[::2] - rewards[1::2]


def _loss(model: ScalarModel, batch: Batch) -> tuple[Tensor, Metrics]:
    margins = _margins(model, batch)
    right = 0.5 * (margins.detach().sign() + 1)
    return logistic(margins).sum() / batch.items, {"accuracy": float(right.mean())}
