"""Self-Play Preference Optimization, on language."""

from typing import Any, Unpack

import torch

from postgrad.advantages.pairing import win_rate_rewards
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import Given, render_prompts
from postgrad.methods.language.frontier import Frontier
from postgrad.methods.language.online import JudgedSettings, find_preference, require_samples
from postgrad.methods.language.policy_gradient import PolicyGradientSettings, SampledPolicyGradient
from postgrad.methods.language.rollouts import rollout_batch
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.rewards.preferences import preference_matrices
from postgrad.timing import timed


class SelfPlaySettings(JudgedSettings, PolicyGradientSettings):
    """Settings of self-play; `rollout.samples` is K, the size of a group."""

    aggregation: Aggregation = setting(
        "sequence-sum-constant",
        "how token losses become one; the default is the policy gradient of whole responses",
        source="paper's sequence-level reward (inferred)",
    )


class SelfPlay(SampledPolicyGradient):
    """Self-Play Preference Optimization (Swamy et al. 2024, arXiv:2401.04056), in groups.

    A reward model takes preferences to be transitive. SPO asks for the minimax winner instead, the
    policy that no other is preferred to on average. As that game is symmetric, one policy that
    plays itself suffices: K responses to a prompt are compared with each other, and how much a
    response is preferred to the others is its reward for any policy gradient.

        M_ij = 2 P(y_i preferred to y_j) - 1                 (antisymmetric, in [-1, 1])
        r_i  = 1/(K - 1) sum_{j != i} M_ij                   (a group's rewards sum to 0)
        L    = - mean_i r_i sum_t log pi(y_it) / max_new_tokens

    The rewards are their own baseline and are not divided by the group's deviation, so a group that
    is nearly undecided pushes little. The guarantee is for the uniform mixture of all iterates:
    under cyclic preferences the last one may go round. With several steps a rollout
    (`epochs`, `minibatches`) the ratio is clipped as in PPO. `kl_coefficient` keeps the policy near
    the initial one, which the paper leaves open. Not SPPO (arXiv:2405.00675), which regresses
    log-ratios on win rates. `spo-self-play-control` is the form for environments. No official code
    is known.
    """

    Config = SelfPlaySettings
    recipe = {"precision": "auto", "learning_rate": 1e-6, "steps": 100}
    config: SelfPlaySettings

    def __init__(
        self,
        config: SelfPlaySettings,
        place: Place,
        *,
        preference: Any = None,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        require_samples(config.rollout)
        super().__init__(config, place, "prompts", given)
        self.preference = find_preference(config, place, self.data, preference, reward)
        self.prompts = render_prompts(
            self.policy, self.data, config, reserve=config.rollout.max_new_tokens
        )
        self.frontier = Frontier.of(config, config.frontier, self.materials, place, self.preference)
        if self.frontier is not None:
            self.policy.freeze_reference()

    def check(self) -> None:
        self.preference.probe(self.data.rows[0])

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step).tolist()
        size = self.config.rollout.samples
        rollouts = self.roll_out([self.prompts[i] for i in index], "rollout", step)
        texts = [rollouts.texts[i : i + size] for i in range(0, len(rollouts.texts), size)]
        with timed("reward"):
            preferences = torch.stack(
                preference_matrices(self.preference, [self.data.rows[i] for i in index], texts)
            )
        rewards = win_rate_rewards(2 * preferences - 1)
        group = torch.arange(len(index)).repeat_interleave(size)
        return self.learnable(
            rollout_batch(rollouts, step, group=group, reward=rewards.flatten(), terms={})
        )

    def describe_batch(self, batch: Batch) -> Metrics:
        """Rewards sum to 0; what is followed is how far a group's best and worst are apart."""
        rewards = batch.reward.view(-1, self.config.rollout.samples)
        gap = rewards.amax(1) - rewards.amin(1)
        metrics = super().describe_batch(batch)
        del metrics["reward"]
        return {
            **metrics,
            "preference/gap": float(gap.mean()),
            "preference/undecided_groups": float((gap == 0).float().mean()),
        }

    def evaluate(self) -> Metrics:
        """On held-out prompts: win rate against the reference, KL to it, and reward if known."""
        return self.frontier.measure(self.policy) if self.frontier is not None else {}

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []
