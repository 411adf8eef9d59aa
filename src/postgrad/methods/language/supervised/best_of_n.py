"""Best of n samples: fine-tuned on, and measured."""

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.pairing import best_of_n_divergence
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.language.base import (
    Given,
    RolloutSettings,
    draw_responses,
    find_materials,
    render_prompts,
)
from postgrad.methods.language.frontier import Frontier, FrontierSettings
from postgrad.methods.language.rewarded import RewardedSettings, TaskReward
from postgrad.rewards.preferences import BradleyTerry
from postgrad.sampling.generation import Rollouts


class BestOfNSettings(RewardedSettings):
    """Settings of best of n; n is `rollout.samples`."""

    rollout: RolloutSettings = setting(RolloutSettings(), "how the policy is sampled")
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


class BestOfN(Method):
    """Fine-tuning on the best of n samples (RAFT; Dong et al. 2023, arXiv:2304.06767).

    Every step the policy draws n responses to each prompt, the one with the highest reward is kept
    (the first of equals), and supervised fine-tuning follows:

        y* = argmax_i r(y_i),   L = - sum_t log pi(y*_t) / number of kept tokens in the batch

    Evaluations also measure what it imitates, the best of n samples of the initial policy without
    any training: `best_of_n/reward` is its mean reward on held-out prompts, `best_of_n/kl` the
    known bound log n - (n - 1)/n on its KL to the initial policy (arXiv:2401.01879). Deviation: one
    optimiser step a draw, where RAFT fine-tunes for longer on each.
    """

    Config = BestOfNSettings
    recipe = {"precision": "auto", "learning_rate": 2e-5, "steps": 100}
    config: BestOfNSettings

    def __init__(
        self, config: BestOfNSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        super().__init__(config, place)
        if config.rollout.samples < 2:
            raise PostgradError(
                "rollout.samples: the best of n needs at least 2 samples a prompt, got "
                f"{config.rollout.samples}"
            )
        found = find_materials(config, place, "prompts", given, corrected=True)
        self.policy, self.data, self.order = found.policy, found.data, found.order
        self.reward = TaskReward(config, self.data, reward)
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        self.held_out = found.held_out
        if self.held_out is not None:
            self.held_out_prompts = render_prompts(self.policy, self.held_out, config, room)
        self.policy.freeze_reference()
        self.frontier = Frontier.of(
            config, config.frontier, found, place, BradleyTerry(self.reward.functions)
        )
        self._imitated: float | None = None  # the reward of the best of n, once it is measured

    def check(self) -> None:
        self.reward.probe()

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def _drawn(self, prompts: list[Tensor], *stream: str | int) -> Rollouts:
        return draw_responses(self.policy, prompts, self.config.rollout, self.place.seed, *stream)

    def _judged(self, rows: list[dict[str, Any]], rollouts: Rollouts) -> Tensor:
        """Rewards `[prompts, n]`."""
        n = self.config.rollout.samples
        total, _ = self.reward.of([row for row in rows for _ in range(n)], rollouts)
        return total.view(len(rows), n)

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step).tolist()
        rollouts = self._drawn([self.prompts[i] for i in index], "rollout", step)
        rewards = self._judged([self.data.rows[i] for i in index], rollouts)
        # a stable sort, so that of equals the first is kept
        best = rewards.argsort(dim=1, descending=True, stable=True)[:, 0]
        kept = (torch.arange(len(index)) * rewards.shape[1] + best).tolist()
        responses = [rollouts.responses[i] for i in kept]
        lengths = torch.tensor([len(response) for response in responses])
        prompts = [rollouts.prompts[i] for i in kept]
        return Batch(
            prompts=prompts,
            responses=responses,
            texts=[rollouts.texts[i] for i in kept],
            mask=torch.arange(int(lengths.max()))[None, :] < lengths[:, None],
            cost=lengths + torch.tensor([len(prompt) for prompt in prompts]),
            rewards=rewards,
            finished=rollouts.finished[kept],
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        scores = self.policy.score(
            batch.prompts, batch.responses, temperature=self.config.rollout.temperature
        )
        return -scores.logprobs[scores.mask].sum() / batch.tokens, {}

    def describe_batch(self, batch: Batch) -> Metrics:
        return {
            "reward": float(batch.rewards.mean()),
            "reward/best": float(batch.rewards.amax(1).mean()),
            "response/length": float(batch.mask.sum(1).float().mean()),
            "response/truncated": float((~batch.finished).float().mean()),
        }

    def evaluate(self) -> Metrics:
        """Of the policy: reward, win rate and KL. Of the best of n before training: reward, KL."""
        if self.held_out is None or self.frontier is None:
            return {}
        if self._imitated is None:
            with self.policy.reference():
                drawn = self._drawn(self.held_out_prompts, "best of n")
            self._imitated = float(self._judged(self.held_out.rows, drawn).amax(1).mean())
        return {
            **self.frontier.measure(self.policy),
            "best_of_n/reward": self._imitated,
            "best_of_n/kl": best_of_n_divergence(self.config.rollout.samples),
        }

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.policy.decode(batch.prompts[i]),
                "response": batch.texts[i],
                "reward": float(batch.rewards[i].max()),
                "mean reward of the n": float(batch.rewards[i].mean()),
            }
            for i in range(min(len(batch), 4))
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
