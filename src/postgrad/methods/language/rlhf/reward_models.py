"""Reward models on pairs of responses: how they are found, and what they say."""

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import LanguageSettings, named_policy
from postgrad.methods.language.comparisons import SCORING_TOKENS, accuracy
from postgrad.models.language import LanguagePolicy
from postgrad.models.scalar import ScalarModel, is_reward_model, load_scalar
from postgrad.timing import timed


def scalar_model(
    config: LanguageSettings, place: Place, given: LanguagePolicy | ScalarModel | None
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


def pair_features(model: ScalarModel, batch: Batch) -> Tensor:
    """What the reward is read from, `[B, 2, d]`, of a batch of pairs."""
    prompts = [prompt for prompt in batch.prompts for _ in range(2)]
    features = model.features(prompts, [r for pair in batch.responses for r in pair])
    return features.view(len(batch), 2, -1)


@torch.no_grad()
def known_rewards(model: ScalarModel, batch: Batch) -> Tensor:
    """Rewards `[B, 2]` of a batch of pairs without gradients, on the CPU."""
    with timed("scoring"):
        parts = batch.split(SCORING_TOKENS)
        return torch.cat([model.read(pair_features(model, part)).cpu() for part in parts])


def reward_metrics(rewards: Tensor, batch: Batch) -> Metrics:
    """What is followed in training, as the data label the pairs."""
    rewards = rewards.detach().cpu()
    return {
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "rewards/margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "rewards/accuracy": accuracy(rewards, batch.scores, batch.present),
    }
