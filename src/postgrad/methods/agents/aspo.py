"""Advantage Shaping Policy Optimization."""

from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.advantages.shaping import shape_advantage
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.agents.tools import ToolChoice, require_tool
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import Given
from postgrad.methods.language.parts.advantages import Deviation, Standardised
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.verifiable.dapo import DAPO, DAPOSettings
from postgrad.sampling.conversations import first_replies


class EarlyCalls(Deviation):
    delta: float = setting(
        -2.0, "weight of the first call's place; below 0 earlier is better (paper: -2 to -2.5)",
        lt=0, source="paper, §4.5",
    )  # fmt: skip
    bound: float = setting(
        0.7, "k: the bias is at most this share of the advantage (paper: 0.7 to 0.9)",
        gt=0, lt=1, source="paper, §4.5",
    )  # fmt: skip
    correct: float = setting(1.0, "rewards from this on are those of correct responses")


class EarlyCall(Standardised):
    """GRPO's, with a bounded bias for early calls of a tool in correct responses (ASPO)"""

    Config = EarlyCalls

    def __call__(self, batch: Batch) -> Tensor:
        advantages = super().__call__(batch)
        if "turns" not in batch:
            return advantages
        place = first_replies(batch.written, batch.turns, batch.cost)
        return shape_advantage(
            advantages,
            (place >= 0) & (batch.reward >= self.config.correct),
            place.to(advantages),
            batch.cost.to(advantages),
            batch.group,
            delta=self.config.delta,
            bound=self.config.bound,
        )


class ASPOSettings(DAPOSettings):
    """ASPO's settings: DAPO's with another advantage, and a tool."""

    advantage: AdvantageChoice = setting(
        "early-call", "from rewards to advantages", source="paper, eq. 2"
    )
    tool: ToolChoice = setting("python", "what the policy can call while it writes", source="paper")


class ASPO(DAPO):
    """Advantage Shaping Policy Optimization (Lin and Xu 2025, arXiv:2508.19201).

    A policy with a tool should call it early, but a bonus in the reward does harm: in a group that
    is right throughout the correctness cancels, normalisation blows the bonus up to unit variance,
    and about half of the correct responses are punished. ASPO leaves the reward alone and
    adds a bounded bias to the final advantage of responses that are correct and call the tool,

        A_i = Â_i + clip(delta (p_i - mean p) / mean L, -k Â_i, k Â_i)

    with Â DAPO's advantage, p_i the token at which the first call is answered, L_i the length, and
    means over these responses of a prompt. As k < 1 no correct response is punished. All else is
    DAPO's: clip-higher, dynamic sampling, a mean over tokens, no KL.

    Calls are found by the turns of the conversation, not in the text. Both p and L count all
    tokens after the prompt, what the tool said included (the paper does not say: uncertain). A call
    that no reply followed, for want of room or turns, does not count. The paper gives delta and k
    as -2 and 0.7, or -2.5 and 0.9, in its text, and other values in its figures (uncertain).
    """

    Config = ASPOSettings
    config: ASPOSettings

    def __init__(
        self, config: ASPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        require_tool(config.tool, "aspo prefers early calls of a tool")
        if config.max_turns < 2:
            raise PostgradError(
                f"max_turns: an answer after a call takes at least 2 turns, got {config.max_turns}"
            )
        super().__init__(config, place, reward=reward, **given)

    def describe_batch(self, batch: Batch) -> Metrics:
        place = first_replies(batch.written, batch.turns, batch.cost)
        calling = place >= 0
        rounds = torch.stack([turns.max() for turns in batch.turns]).float()
        return {
            **super().describe_batch(batch),
            "tool/share": float(calling.float().mean()),
            "tool/rounds": float(rounds.mean()),
            **({"tool/first": float(place[calling].float().mean())} if calling.any() else {}),
        }
