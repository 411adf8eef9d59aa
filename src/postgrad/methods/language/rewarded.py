"""What a sampled response is worth: for the methods that learn from a reward."""

from typing import Any

import torch
from torch import Tensor

from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import LanguageSettings, RolloutSettings
from postgrad.models.language import LanguagePolicy
from postgrad.rewards import RewardSet, RewardSpec, load_rewards
from postgrad.sampling.generation import Rollouts, generate
from postgrad.tasks import Examples
from postgrad.timing import timed


class RewardedSettings(LanguageSettings):
    """Settings of every method whose samples are judged by a reward."""

    data: DataSettings = setting(DataSettings(name="reasoning-gym/chain_sum"), "prompts")
    reward: list[RewardSpec] | RewardSpec | None = setting(
        None, "a verifier, module:function or file.py:function, or several with weights"
    )
    reward_time_limit: float = setting(60.0, "seconds a reward call may take", gt=0)


class TaskReward:
    """The reward of responses to the rows of a data set.

    It is the one passed from Python, or the one `config` names, or the data's own verifier.

    Raises:
        PostgradError: there is none; and all that `load_rewards` raises.
    """

    def __init__(self, config: RewardedSettings, data: Examples, reward: Any = None):
        spec = reward if reward is not None else (config.reward or data.verifier)
        if spec is None:
            raise PostgradError(
                f"reward: {data.name} brings no verifier of its own: name one, e.g. "
                "reward=numeric, or your own reward=file.py:function"
            )
        self.functions = (
            spec
            if isinstance(spec, RewardSet)
            else load_rewards(spec, time_limit=config.reward_time_limit)
        )
        self._first_row = data.rows[0]

    def probe(self) -> None:
        """Try it on one row, before any compute is spent."""
        self.functions.probe(self._first_row)

    def of(
        self, rows: list[dict[str, Any]], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward `[N]` of responses to the prompts of N rows, and its terms `[N]` by name."""
        ids = [response.tolist() for response in rollouts.responses]
        with timed("reward"):
            total, terms = self.functions.of_rows(rows, rollouts.texts, ids)
        return torch.tensor(total), {name: torch.tensor(term) for name, term in terms.items()}

    def evaluate(
        self,
        policy: LanguagePolicy,
        held_out: Examples,
        prompts: list[Tensor],
        rollout: RolloutSettings,
    ) -> Metrics:
        """Mean reward of greedy responses to the rows of `held_out`, whose ids are `prompts`."""
        greedy = rollout.sampling(temperature=0.0)
        rollouts = generate(policy, prompts, greedy, seeds=[0] * len(prompts))
        return self.measured(held_out.rows, rollouts)

    def measured(self, rows: list[dict[str, Any]], rollouts: Rollouts) -> Metrics:
        """Means over responses to the prompts of N rows: reward, its terms, length in tokens."""
        reward, terms = self.of(rows, rollouts)
        means = {name: float(term.mean()) for name, term in terms.items()}
        lengths = [float(len(response)) for response in rollouts.responses]
        return {
            "reward": float(reward.mean()),
            **({f"reward/{n}": m for n, m in means.items()} if len(means) > 1 else {}),
            "length": sum(lengths) / len(lengths),
        }


def require_one(**named: Any) -> None:
    """Stop unless one of two settings says who judges: a function, or else a language model."""
    (function, first), (model, second) = named.items()
    if (first is None) == (second is None):
        raise PostgradError(
            f"{function}: name a function, e.g. {function}=file.py:function, or else a language "
            f"model, {model}=…, got {'neither' if first is None else 'both'}"
        )
