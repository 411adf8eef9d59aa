"""Self-Play Preference Optimization."""

from torch import Tensor

from postgrad.advantages.pairing import win_rates
from postgrad.config import setting
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.games.rounds import ROUNDS, RoundSettings
from postgrad.methods.language.online import OnlinePreference
from postgrad.objectives.iterative import sppo


class SPPOSettings(RoundSettings):
    """SPPO's settings."""

    beta: float = setting(
        0.001,
        "1/eta, weight of the KL to the policy that sampled: the inverse step size",
        gt=0,
        source="official code",
    )
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=5), "how the policy is sampled", source="official code"
    )


class SPPO(OnlinePreference):
    """Self-Play Preference Optimization (Wu et al. 2024, arXiv:2405.00675).

    Multiplicative weights on a preference game: pi_{t+1} ∝ pi_t exp(eta P(y > pi_t)). Where the
    logarithm of the normaliser is taken to be eta/2, every response has a target of its own, and no
    pairs are needed:

        L = mean over the K samples of (log pi(y)/pi_t(y) - eta (P(y > pi_t) - 1/2))^2
        eta = 1/beta

    P(y > pi_t) is the mean probability with which y is preferred to the other samples of its
    prompt. A step of the loop is a round, `epochs` times `minibatches` are its optimiser steps.
    There is no KL to the reference. Deviations: the paper's mean includes y itself, at 1/2, which
    makes targets smaller by (K - 1)/K; the official code learns from the best and the worst sample
    alone, as `apo` with `base=sppo` does.
    """

    Config = SPPOSettings
    recipe = ROUNDS
    needs_centre = True
    config: SPPOSettings

    def choose(self, preferences: Tensor) -> list[list[int]]:
        order: list[int] = win_rates(preferences).argsort(descending=True, stable=True).tolist()
        return [order]

    def losses(self, found: Compared) -> Tensor:
        each = sppo(found.logprobs - found.others["centre"], found.scores, self.config.beta)
        return each.mean(1)
