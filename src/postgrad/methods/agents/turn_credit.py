"""Advantages of turns: what each turn of a conversation earned, beside its outcome."""

from typing import Literal

import torch
from torch import Tensor

from postgrad.advantages.turns import (
    TurnNormalisation,
    normalised_turns,
    position_centred,
    spread_turns,
    turn_returns,
    with_outcomes,
)
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.methods.language.parts.base import Advantage, Around, require_groups


class TurnCredit(Settings):
    normalise: TurnNormalisation = setting(
        "joint", "all rewards of a group's turns together; gains and outcomes each for themselves; "
        "or returns of tokens at one position, centred (official code of IGPO)", source="IGPO, v1",
    )  # fmt: skip
    gamma: float = setting(1.0, "discount of a later turn's advantage", ge=0, le=1, source="IGPO")
    std: Literal["sample", "population"] = setting("sample", "deviation over n - 1, or n")
    eps: float = setting(1e-6, "added to the deviation", ge=0)


class Turns(Advantage):
    """discounted sum of a turn's and its later turns' rewards, normalised in the group (IGPO)

    A batch may have `turn_rewards` `[N, K]`, of all turns but the last, whose reward is that of the
    response. Without turns, or without rewards of their own, it is GRPO's.
    """

    Config = TurnCredit

    def __init__(self, config: TurnCredit, around: Around):
        super().__init__(config, around)
        require_groups(around, "a normalisation of turns")

    def __call__(self, batch: Batch) -> Tensor:
        inside = torch.arange(batch.mask.shape[1]) < batch.cost[:, None]
        turns = batch.turns if "turns" in batch else torch.zeros_like(inside, dtype=torch.long)
        counts = torch.where(inside, turns, 0).amax(1) + 1
        nothing = torch.zeros(len(batch), int(counts.max()))
        own = batch.turn_rewards if "turn_rewards" in batch else nothing
        rewards = with_outcomes(own, batch.reward, counts)
        config = self.config
        if config.normalise == "position":
            returns = turn_returns(rewards, counts, config.gamma)
            centred = position_centred(spread_turns(returns, turns, inside), batch.group)
            return torch.where(inside, centred, 0.0)
        normalised = normalised_turns(
            rewards, counts, batch.group, by=config.normalise, std=config.std, eps=config.eps
        )
        return spread_turns(turn_returns(normalised, counts, config.gamma), turns, inside)
