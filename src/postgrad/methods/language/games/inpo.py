"""Iterative Nash Policy Optimization."""

from typing import Any, Literal

from torch import Tensor

from postgrad.advantages.pairing import (
    best_and_worst,
    drawn_verdicts,
    neighbours,
    tournament,
    win_rates,
)
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.games.rounds import ROUNDS, RoundSettings
from postgrad.methods.language.online import OnlinePreference
from postgrad.objectives.iterative import inpo
from postgrad.seeding import generator


class INPOSettings(RoundSettings):
    """INPO's settings."""

    beta: float = setting(
        0.005,
        "eta, weight of the KL to the policy that sampled: the inverse step size of mirror descent",
        gt=0,
        source="paper, appendix B",
    )
    reference_share: float = setting(
        1 / 3,
        "tau/eta, where tau is the weight of the KL to the reference in the game",
        ge=0,
        le=1,
        source="paper, appendix B",
    )
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=8), "how the policy is sampled", source="paper, section 4"
    )
    selection: Literal["tournament", "best-and-worst", "independent"] = setting(
        "tournament",
        "which samples are compared: champion and last of a tournament, highest and lowest win "
        "rate, or disjoint pairs with drawn labels",
        source="paper, section 4",
    )


class INPO(OnlinePreference):
    """Iterative Nash Policy Optimization (Zhang et al. 2024, arXiv:2407.00617).

    Mirror descent in the KL-regularised preference game needs the win rate of every response. A
    squared loss of labelled pairs with a constant target has the same minimiser, so one bit a pair
    is enough. Round t samples from pi_t, has pairs labelled, and fits pi_{t+1} from pi_t:

        h = log pi(y_w)/pi(y_l) - (tau/eta) log pi_ref(y_w)/pi_ref(y_l)
            - (1 - tau/eta) log pi_t(y_w)/pi_t(y_l)                        (sums over tokens)
        L = (h - 1/(2 eta))^2,   eta = beta, tau = beta * reference_share

    A step of the loop is a round, `epochs` times `minibatches` are its optimiser steps. With
    `selection=independent` labels are drawn by the preference's probabilities, and the loss is that
    of mirror descent plus a constant; for champion against last, as in the paper's runs, that does
    not hold. Prompts whose champion does not beat the last, or whose samples all win equally often,
    are left out. Deviations: all pairs of a group are judged, where a tournament needs 3K/2 - 1
    verdicts; rounds are smaller and more than the paper's three. Equations from the paper, which
    COMAL's reimplementation shares; no official code is known.
    """

    Config = INPOSettings
    recipe = ROUNDS
    needs_centre = True
    config: INPOSettings

    def __init__(self, config: INPOSettings, place: Place, **given: Any):
        samples = config.rollout.samples
        if config.selection == "tournament" and samples % 2:
            raise PostgradError(
                f"rollout.samples: a tournament needs an even number of samples, got {samples}"
            )
        super().__init__(config, place, **given)

    def verdicts(self, preferences: list[Tensor], step: int) -> list[Tensor]:
        if self.config.selection != "independent":
            return preferences
        random = generator(self.place.seed, "verdicts", step)
        return [drawn_verdicts(matrix, random) for matrix in preferences]

    def choose(self, preferences: Tensor) -> list[list[int]]:
        if self.config.selection == "tournament":
            return tournament(preferences)
        if self.config.selection == "independent":
            return neighbours(preferences)
        wins = win_rates(preferences)
        return [best_and_worst(preferences)] if wins.max() > wins.min() else []

    def losses(self, found: Compared) -> Tensor:
        eta = self.config.beta
        tau = eta * self.config.reference_share
        return inpo(found.logprobs, found.reference, found.others["centre"], eta, tau)
