"""Secrets of RLHF in Large Language Models Part II: Reward Modeling."""

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.language.base import GivenData, find_examples, named_policy
from postgrad.methods.language.comparisons import SCORING_TOKENS, accuracy
from postgrad.methods.language.preference.base import Comparisons, ComparisonSettings
from postgrad.models.language import LanguagePolicy
from postgrad.models.scalar import ScalarModel, is_reward_model, load_scalar
from postgrad.objectives.reward_modeling import bradley_terry
from postgrad.timing import timed


class RewardModelingSettings(ComparisonSettings):
    """Settings of reward modelling."""

    model: str = setting(
        "smollm2", "language model whose body the reward model has, or reward model to go on from"
    )
    label_smoothing: float = setting(
        0.0, "probability p that a label counts as wrong; the paper's is not known", ge=0, lt=0.5
    )


class Given(GivenData, total=False):
    """Objects that a caller in Python may pass in place of names."""

    model: LanguagePolicy | ScalarModel


class RewardModeling(Method):
    """Secrets of RLHF in Large Language Models Part II: Reward Modeling."""

    Config = RewardModelingSettings
    recipe = {
        "precision": "auto",
        "learning_rate": 5e-6,
        "adam_betas": (0.9, 0.95),
        "adam_epsilon": 1e-6,
        "steps": 1000,
    }
    config: RewardModelingSettings

    def __init__(self, config: RewardModelingSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place)
        data, held_out, self.order = find_examples(config, place, "preferences", given)
        self.model = scalar_model(config, place, given.get("model"))
        self.model.prompts_as_turns = data.chat and self.model.has_chat_template
        self.data = Comparisons(self.model, data, config)
        self.held_out = Comparisons(self.model, held_out, config) if held_out else None

    def modules(self) -> dict[str, nn.Module]:
        return {"reward_model": self.model}

    def collect(self, step: int) -> Batch:
        return self.data.batch(self.order.indices(step))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        rewards = rewards_of(self.model, batch)
        difference = rewards[:, 0] - rewards[:, 1]
        losses = bradley_terry(difference, smoothing=self.config.label_smoothing)
        return losses.sum() / batch.items, reward_metrics(rewards.detach(), batch)

    def evaluate(self) -> Metrics:
        """Accuracy, margin and Bradley-Terry loss on held-out pairs."""
        if self.held_out is None:
            return {}
        batch = self.held_out.batch(torch.arange(len(self.held_out)))
        rewards = known_rewards(self.model, batch)
        margin = rewards[:, 0] - rewards[:, 1]
        return {
            "accuracy": accuracy(rewards, batch.scores, batch.present),
            "margin": float(margin.mean()),
            "loss": float(bradley_terry(margin).mean()),
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        part = batch.select(torch.arange(min(len(batch), 4)))
        rewards = known_rewards(self.model, part).tolist()
        return [
            {
                "prompt": self.model.decode(part.prompts[i]),
                "chosen": self.model.decode(chosen),
                "rejected": self.model.decode(rejected),
                "reward of chosen": rewards[i][0],
                "reward of rejected": rewards[i][1],
            }
            for i, (chosen, rejected) in enumerate(part.responses)
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.examples.fingerprint}

    def save(self, folder: Path) -> None:
        self.model.save(folder)


def scalar_model(
    config: RewardModelingSettings, place: Place, given: LanguagePolicy | ScalarModel | None
) -> ScalarModel:
    """The reward model given or named by `config`, or one on the body of a language model."""
    if config.tune != "full":
        raise PostgradError(f"tune: a reward model is trained in full, got {config.tune!r}")
    if isinstance(given, ScalarModel):
        return given
    if given is not None:
        return ScalarModel.on_body_of(given)
    remote = config.trust_remote_code
    if is_reward_model(config.model, trust_remote_code=remote):
        return load_scalar(config.model, device=place.device, trust_remote_code=remote)
    return ScalarModel.on_body_of(named_policy(config, place))


def rewards_of(model: ScalarModel, batch: Batch) -> Tensor:
    """Rewards `[B, 2]` of a batch of pairs."""
    prompts = [prompt for prompt in batch.prompts for _ in range(2)]
    return model.rewards(prompts, [r for pair in batch.responses for r in pair]).view(-1, 2)


@torch.no_grad()
def known_rewards(model: ScalarModel, batch: Batch) -> Tensor:
    """The same without gradients, on the CPU."""
    with timed("scoring"):
        return torch.cat([rewards_of(model, part).cpu() for part in batch.split(SCORING_TOKENS)])


def reward_metrics(rewards: Tensor, batch: Batch) -> Metrics:
    """What is followed in training."""
    rewards = rewards.cpu()
    return {
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "rewards/margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "rewards/accuracy": accuracy(rewards, batch.scores, batch.present),
    }
