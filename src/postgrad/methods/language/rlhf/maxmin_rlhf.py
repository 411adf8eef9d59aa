"""MaxMin-RLHF."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.advantages.maxmin import GroupWeights, MaxMinForm, maxmin_reward
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import draw_responses, render_prompts
from postgrad.methods.language.rewarded import TaskReward
from postgrad.methods.language.rlhf.actor_critic import ActorCritic, ActorCriticSettings
from postgrad.methods.language.rlhf.mixture import MixtureSettings, RewardMixture
from postgrad.methods.language.rollouts import TERM
from postgrad.rewards.functions import Term
from postgrad.sampling.generation import Rollouts
from postgrad.seeding import generator


class MaxMinRLHFSettings(ActorCriticSettings):
    """MaxMin-RLHF's settings."""

    data: DataSettings = setting(
        DataSettings(name="reasoning-gym/chain_sum"),
        "prompts, with a reward for each group; or preferences with a column user, from which the "
        "groups' rewards are learnt first",
    )
    maxmin: MaxMinForm = setting(
        "group", "reward of the worst-off group; least reward of each sample (official code); or "
        "weights that follow the groups (ours)", source="paper, algorithm 1"
    )  # fmt: skip
    weights_rate: float = setting(
        0.1, "eta of lambda_u <- lambda_u exp(-eta F_u) / Z, with maxmin=weights", gt=0
    )
    reference_samples: int = setting(
        256, "samples of the reference on which each group's reward is brought to mean 0 and "
        "deviation 1; 0: rewards as they are (official code)", ge=0
    )  # fmt: skip
    em: MixtureSettings = setting(MixtureSettings(), "how the groups' rewards are learnt")


class MaxMinRLHF(ActorCritic):
    """MaxMin-RLHF (Chakraborty et al. 2024, arXiv:2402.08925).

    One reward model of a mixed population follows its majority. So there is one for each group u,
    and the policy is trained for whichever group is worst off:

        max_pi  min_u F_u(pi) - beta KL(pi || pi_ref),   F_u(pi) = E_{y ~ pi} r_u(x, y)

        group     R = r_{u*},               u* = argmin_u F_u of the batch
        sample    R = min_u r_u             of each response
        weights   R = sum_u lambda_u r_u,   lambda_u <- lambda_u exp(-eta F_u) / Z

    all else is PPO. The groups' rewards are `reward=[one, another]`, where a weight scales what a
    group's reward counts; or, without `reward`, they are learnt from preferences with a column
    `user`, by hard EM over users (see `RewardMixture`), in the run's first em.rounds x em.steps
    steps; the policy then learns on the prompts of the pairs. The models are saved with the policy.

    A Bradley-Terry reward has no scale or origin of its own, and a minimum compares both: rewards
    are standardised on samples of the reference (ours; set `reference_samples=0` for rewards that
    can be compared as they are). Metrics are of the rewards themselves, by group. What is left of
    an offset between a model's prompts is not removed.

    Deviations: the official code takes the minimum of each sample (`maxmin=sample`), adapts reward
    models by LoRA (here all weights) and whitens rewards after the minimum (here advantages).
    """

    Config = MaxMinRLHFSettings
    recipe = {**ActorCritic.recipe, "steps": 400}
    data_format = ("preferences", "prompts")
    config: MaxMinRLHFSettings

    mixture: RewardMixture | None = None
    # what compares the groups, once all their rewards are known
    weights: GroupWeights | None = None
    scale: Tensor | None = None  # `[2, U, 1]`: mean and deviation of rewards of the reference

    def find_reward(self, reward: Any) -> TaskReward:
        config = self.config
        if reward is None and not config.reward and self.data.format == "preferences":
            room = config.rollout.max_new_tokens
            prompts = render_prompts(self.policy, self.data, config, room)
            self.mixture = RewardMixture(
                self.policy, self.data, prompts, config.em, room, self.place
            )
            reward = self.mixture.rewards(config.reward_time_limit)
        return super().find_reward(reward)

    @property
    def groups(self) -> list[Term]:
        """The rewards that count; not those of groups that no user belongs to."""
        terms = self.reward.functions.terms
        return terms if self.mixture is None else [terms[group] for group in self.mixture.inhabited]

    def check(self) -> None:
        super().check()
        if len(self.groups) == 1:
            warnings.warn("there is one group: MaxMin-RLHF is plain RLHF", stacklevel=2)
        if self.mixture is not None and self.place.steps <= self.mixture.total:
            raise PostgradError(
                f"steps: expected more than the em.rounds x em.steps = {self.mixture.total} in "
                f"which the groups' rewards are learnt, got {self.place.steps}"
            )

    def modules(self) -> dict[str, nn.Module]:
        learnt = self.mixture.models if self.mixture is not None else {}
        return {**super().modules(), **learnt}

    def rates(self) -> dict[str, float]:
        learnt = self.mixture.models if self.mixture is not None else {}
        return {**super().rates(), **dict.fromkeys(learnt, self.config.em.rate)}

    def collect(self, step: int) -> Batch:
        if self.mixture is not None and step < self.mixture.total:
            return self.mixture.collect(step)
        self._compare_groups()
        return super().collect(step)

    def judge(
        self, rows: list[dict[str, Any]], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _, terms = super().judge(rows, rollouts)
        lambdas = self.weights.value if self.weights is not None else None
        return maxmin_reward(self.scores(terms), self.config.maxmin, lambdas), terms

    def scores(self, values: Mapping[str, Tensor]) -> Tensor:
        """What N responses are worth to each group, `[U, N]`, from rewards `[N]` by name."""
        raw = torch.stack([values[term.name] for term in self.groups])
        counts = torch.tensor([[term.weight] for term in self.groups])
        mean, deviation = self.scale if self.scale is not None else (0.0, 1.0)
        return counts * (raw - mean) / deviation

    @torch.no_grad()
    def _compare_groups(self) -> None:
        """Standardise rewards, and begin with even weights: before the first samples are judged."""
        if self.config.maxmin == "weights" and self.weights is None:
            self.weights = GroupWeights(len(self.groups), self.config.weights_rate)
        if self.scale is not None or not self.config.reference_samples:
            return
        seed, size = self.place.seed, self.config.batch_size
        random = generator(seed, "reference samples")
        index = torch.randint(len(self.prompts), (self.config.reference_samples,), generator=random)
        found = []
        for number, part in enumerate(index.split(size)):
            with self.policy.reference():
                drawn = draw_responses(
                    self.policy,
                    [self.prompts[i] for i in part.tolist()],
                    self.config.rollout,
                    seed,
                    "reference samples",
                    number,
                    samples=1,
                )
            _, terms = super().judge([self.data.rows[i] for i in part.tolist()], drawn)
            found.append(torch.stack([terms[term.name] for term in self.groups]))
        rewards = torch.cat(found, 1)
        deviation, mean = torch.std_mean(rewards, 1, correction=0, keepdim=True)
        # a reward that the reference's samples do not differ in is only shifted
        self.scale = torch.stack([mean, torch.where(deviation > 0, deviation, 1.0)])

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        mixture = self._learning_from(batch)
        if mixture is not None:
            return mixture.update(batch, optimise)
        metrics = super().update(batch, optimise)
        if self.weights is not None:
            self.weights.update(self._means(batch))
        return metrics

    def _learning_from(self, batch: Batch) -> RewardMixture | None:
        """What learns from this batch in place of the policy."""
        return self.mixture if "reward_group" in batch else None

    def _means(self, batch: Batch) -> Tensor:
        """F `[U]` of a batch of responses."""
        values = {term.name: batch.fields()[TERM + term.name] for term in self.groups}
        return self.scores(values).mean(1)

    def describe_batch(self, batch: Batch) -> Metrics:
        mixture = self._learning_from(batch)
        if mixture is not None:
            return mixture.describe()
        means = self._means(batch)
        metrics = {
            **super().describe_batch(batch),
            "maxmin/value": float(means.min()),
            "maxmin/worst_group": float(means.argmin() + 1),
        }
        if self.weights is not None:
            pairs = zip(self.groups, self.weights.value.tolist(), strict=True)
            metrics |= {f"maxmin/weight/{term.name}": weight for term, weight in pairs}
        return metrics

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        mixture = self._learning_from(batch)
        return mixture.samples(batch) if mixture is not None else super().samples(batch)

    def evaluate(self) -> Metrics:
        """Of fresh samples on held-out prompts: each group's reward, and the worst-off group's."""
        if self.mixture is not None and not self.mixture.learnt:
            return {}
        self._compare_groups()
        metrics = super().evaluate()
        found = {term.name: metrics.get(TERM + term.name) for term in self.groups}
        values = {name: torch.tensor([mean]) for name, mean in found.items() if mean is not None}
        if len(values) == len(self.groups) > 1 and self.config.frontier.reward is None:
            metrics["reward"] = float(self.scores(values).min())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "scale": self.scale,
            "weights": self.weights.state_dict() if self.weights is not None else None,
            "mixture": self.mixture.state_dict() if self.mixture is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.mixture is not None:
            self.mixture.load_state_dict(state["mixture"])
        self.scale = state["scale"]
        if state["weights"] is not None:
            self.weights = GroupWeights(len(self.groups), self.config.weights_rate)
            self.weights.load_state_dict(state["weights"])

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.mixture is not None:
            self.mixture.save(folder)
