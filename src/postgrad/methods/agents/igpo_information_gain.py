"""Information Gain-based Policy Optimization."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.advantages.turns import information_gains
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.agents.tools import ToolChoice, require_tool
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import Given, RolloutSettings, pad
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.rewards import RewardSpec
from postgrad.rewards.confidence import answer_confidence, enclosed
from postgrad.sampling.conversations import Conversations
from postgrad.sampling.generation import Rollouts
from postgrad.timing import timed


class IGPOSettings(RewardedPolicyGradientSettings):
    """IGPO's settings."""

    advantage: AdvantageChoice = setting(
        "turns", "from rewards to advantages (later version: normalise=separate)",
        source="paper, v1",
    )  # fmt: skip
    gain: Literal["prob", "logprob"] = setting(
        "prob", "a turn's reward is the rise of the answer's probability, or of its logarithm "
        "(later version)", source="paper, v1",
    )  # fmt: skip
    answer_opening: str = setting(
        "Now there is enough information to answer.\n<answer>",
        "what stands before the true answer where its probability is asked",
        source="official code, in its words",
    )
    answer_closing: str = setting("</answer>", "what stands after it", source="official code")
    reward: list[RewardSpec] | RewardSpec | None = setting(
        "f1", "what the answer is worth, at the last turn", source="paper"
    )
    tool: ToolChoice = setting("search", "what the policy can call while it writes", source="paper")
    max_turns: int = setting(10, "how often the policy may write", gt=0, source="official script")
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=16, max_new_tokens=512), "how the policy is sampled",
        source="official script: 16 samples",
    )  # fmt: skip
    aggregation: Aggregation = setting(
        "sequence-mean", "how token losses become one", source="paper"
    )
    kl_coefficient: float = setting(
        0.001, "weight of the KL to the initial policy", ge=0, source="official script"
    )
    entropy_coefficient: float = setting(
        0.001, "weight of the entropy bonus", ge=0, source="official configuration"
    )


class IGPO(PolicyGradient):
    """Information Gain-based Policy Optimization (Wang et al. 2025, arXiv:2510.14967).

    With an outcome alone, conversations of many turns often earn the same, and good turns before a
    wrong answer nothing. IGPO asks after every turn how likely the policy itself now finds the true
    answer a, and pays each turn but the last for the rise:

        p_t = exp(1/L sum_j log pi_old(a_j | context after turn t, "... <answer>", a_<j))
        r_t = p_t - p_{t-1}  for t < T,    r_T = F1 of the answer, or -2 for a wrong format
        A_t = sum_{k >= t} gamma^(k - t) (r_k - mean) / std

    with mean and deviation over all turns of a group's responses, and A_t for every token that the
    policy wrote in turn t. Turn t includes what the tool replied, so p_t sees it; only tokens of
    the policy are in the loss, which is PPO's clip with a KL to the initial policy. The true answer
    is only ever in copies that are scored, by the policy that sampled, without gradient.

    The paper's later version takes `gain=logprob` and `advantage.normalise=separate`, which keeps
    gains from lowering wrong answers below zero and is the better choice for new work; the official
    code takes raw rewards, centred by token position (`advantage.normalise=position`). With several
    right answers the first one is scored; F1 takes the best.

    Deviations: a response that ends without an answer, for want of turns or tokens, is worth what
    the reward makes of its text. The normalisation of the first version is known from
    accounts of it (uncertain).
    """

    Config = IGPOSettings
    config: IGPOSettings

    def __init__(
        self, config: IGPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        require_tool(config.tool, "igpo-information-gain rewards the turns before an answer")
        super().__init__(config, place, reward=reward, **given)
        self.answers = [self._answer(number) for number in range(len(self.data))]
        longest = max(len(ids) for ids, _ in self.answers)
        room = self.policy.context_length - max(map(len, self.prompts)) - longest
        if config.rollout.max_new_tokens > room:
            raise PostgradError(
                f"rollout.max_new_tokens: expected at most {room}, got "
                f"{config.rollout.max_new_tokens}: the true answer has to fit behind a response"
            )

    def _answer(self, number: int) -> tuple[Tensor, slice]:
        """The true answer of a row as it is shown to the policy."""
        answer = self.data.rows[number].get("answer")
        first = answer[0] if isinstance(answer, list) and answer else answer
        where = self.data.where(number)
        if first is None or isinstance(first, list) or not str(first).strip():
            raise PostgradError(
                f"{where}: answer: expected the true answer, or a list of its forms, got {answer!r}"
            )
        config = self.config
        try:
            return enclosed(self.policy, str(first), config.answer_opening, config.answer_closing)
        except ValueError as error:
            raise PostgradError(f"{where}: answer: {error}") from None

    def rewarded(
        self, rollouts: Rollouts, step: int, *, row: Tensor, group: Tensor, **fields: Any
    ) -> Batch:
        assert isinstance(rollouts, Conversations)
        gains = self._gains(rollouts, row)
        return super().rewarded(rollouts, step, row=row, group=group, turn_rewards=gains, **fields)

    def _gains(self, rollouts: Conversations, row: Tensor) -> Tensor:
        """The information gain `[N, K]` of every turn but the last."""
        counts = torch.tensor([int(turns.max()) + 1 for turns in rollouts.turns])
        contexts, answers = [], []
        for i, number in enumerate(row.tolist()):
            for turn in range(int(counts[i])):
                before = rollouts.responses[i][rollouts.turns[i] < turn]
                contexts.append(torch.cat([rollouts.prompts[i], before]))
                answers.append(self.answers[number])
        with timed("scoring"):
            confidences = answer_confidence(self.policy, contexts, answers)
        if self.config.gain == "prob":
            confidences = confidences.exp()
        return information_gains(pad(list(confidences.split(counts.tolist()))), counts)

    def describe_batch(self, batch: Batch) -> Metrics:
        counts = torch.where(batch.mask, batch.turns, 0).amax(1) + 1
        before = torch.arange(batch.turn_rewards.shape[1]) < counts[:, None] - 1
        silent = [
            not bool((batch.advantages * batch.mask)[batch.group == group].any())
            for group in batch.group.unique()
        ]
        return {
            **super().describe_batch(batch),
            "turns": float(counts.float().mean()),
            **({"gain": float(batch.turn_rewards[before].mean())} if before.any() else {}),
            "advantage/silent_groups": sum(silent) / len(silent),
        }
