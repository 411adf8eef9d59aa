"""Policy gradients of whole responses, without a critic and with the KL inside the reward."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.penalties import kl_penalised
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.language.base import (
    Given,
    RolloutSettings,
    draw_responses,
    find_materials,
    prompt_minibatches,
    render_prompts,
    require_minibatches,
)
from postgrad.methods.language.comparisons import (
    comparison_batch,
    known_logprobs,
    response_logprobs,
)
from postgrad.methods.language.frontier import Frontier, FrontierSettings
from postgrad.methods.language.online import require_samples
from postgrad.methods.language.rewarded import RewardedSettings, TaskReward
from postgrad.methods.language.rollouts import TERM


class TrajectorySettings(RewardedSettings):
    """Settings of the policy gradients of whole responses."""

    rollout: RolloutSettings = setting(RolloutSettings(samples=2), "how the policy is sampled")
    beta: float = setting(0.05, "weight of the KL to the initial policy in the reward", ge=0)
    eps: float = setting(0.2, "a response's ratio is clipped this far from 1", gt=0, lt=1)
    epochs: int = setting(1, "passes over the rollouts of a step", gt=0)
    minibatches: int = setting(1, "optimiser steps a pass", gt=0)
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


class TrajectoryPolicyGradient(Method):
    """Samples K responses to a prompt and learns from one reward each; a subclass fills `losses`.

    The KL to the reference is taken off the reward when a response is sampled, as a constant:
    r(x, y) - beta log(pi_old(y|x) / pi_ref(y|x)). An item of a batch is a prompt with all its
    responses, in the order in which they were drawn, so they stay together however it is cut.
    """

    recipe = {"precision": "auto", "learning_rate": 1e-6, "steps": 100}
    config: TrajectorySettings

    def __init__(
        self,
        config: TrajectorySettings,
        place: Place,
        *,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        super().__init__(config, place)
        require_samples(config.rollout)
        config.rollout.require_unaltered("the KL in the reward")
        require_minibatches(config.minibatches, config.batch_size)
        found = find_materials(config, place, "prompts", given)
        self.policy, self.data, self.order = found.policy, found.data, found.order
        self.reward = TaskReward(config, found.data, reward)
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        self.policy.freeze_reference()
        self.frontier = Frontier.of(
            config, config.frontier, found, place, rewards=self.reward.functions
        )

    @abstractmethod
    def losses(self, logprobs: Tensor, old: Tensor, credit: Tensor) -> Tensor:
        """The loss `[B]` of each prompt's responses.

        `logprobs` are log pi(y|x), `old` those of the policy that sampled, all `[B, K]`.
        """

    def credit(self, rewards: Tensor) -> Tensor:
        """What responses are learnt by, `[B, K]`, from their rewards less KL `[B, K]` float64."""
        return rewards

    def check(self) -> None:
        self.reward.probe()

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step).tolist()
        prompts = [self.prompts[i] for i in index]
        rollouts = draw_responses(
            self.policy, prompts, self.config.rollout, self.place.seed, "rollout", step
        )
        size = self.config.rollout.samples
        rows = [self.data.rows[i] for i in index for _ in range(size)]
        reward, terms = self.reward.of(rows, rollouts)
        batch = comparison_batch(
            prompts,
            [rollouts.responses[n * size : (n + 1) * size] for n in range(len(index))],
            reward.view(-1, size),
            texts=[rollouts.texts[n * size : (n + 1) * size] for n in range(len(index))],
            finished=rollouts.finished.view(-1, size),
            group=torch.arange(len(index)),
            step=torch.full((len(index),), step),
            **{f"{TERM}{name}": term.view(-1, size) for name, term in terms.items()},
        )
        old = known_logprobs(self.policy, batch)
        with self.policy.reference():
            reference = known_logprobs(self.policy, batch)
        penalised = kl_penalised(
            batch.scores.double(), old.double(), reference.double(), self.config.beta
        )
        credit = self.credit(penalised).float()
        return batch.with_fields(old=old, reference=reference, credit=credit)

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """Whole prompts with their responses, shuffled anew in every epoch."""
        return prompt_minibatches(
            batch, self.config.epochs, self.config.minibatches, self.place.seed
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        logprobs = response_logprobs(self.policy, batch)
        old, credit = batch.old.to(logprobs), batch.credit.to(logprobs)
        value = self.losses(logprobs, old, credit).sum() / batch.items
        change = (logprobs.detach() - old).exp()
        clipped = ((change - 1).abs() > self.config.eps).float()
        return value, {
            "ratio/mean": float(change.mean()),
            "ratio/outside": float(clipped.mean()),
        }

    def describe_batch(self, batch: Batch) -> Metrics:
        rewards = batch.scores
        terms = [name for name in batch.fields() if name.startswith(TERM)]
        return {
            "reward": float(rewards.mean()),
            **{name: float(batch.fields()[name].mean()) for name in terms},
            "reward/degenerate_groups": float((rewards == rewards[:, :1]).all(1).float().mean()),
            "kl": float((batch.old - batch.reference).mean()),
            "response/length": float(batch.lengths.float().mean()),
            "response/truncated": float((~batch.finished).float().mean()),
        }

    def evaluate(self) -> Metrics:
        """Of fresh samples on held-out prompts: reward, and KL to the reference."""
        return self.frontier.measure(self.policy) if self.frontier is not None else {}

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.policy.decode(batch.prompts[i]),
                "response": batch.texts[i][k],
                "reward": float(batch.scores[i, k]),
                "log-ratio to the reference": float(batch.old[i, k] - batch.reference[i, k]),
            }
            for i in range(min(len(batch), 8))
            for k in range(2)
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
