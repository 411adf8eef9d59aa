"""Accelerated Preference Optimization."""

from typing import Any, Literal

from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.games.rounds import ROUNDS, RoundSettings
from postgrad.methods.language.online import OnlinePreference
from postgrad.models.snapshots import Snapshot, soup
from postgrad.objectives.iterative import sppo
from postgrad.objectives.pairwise import ipo, logistic, margin


class APOSettings(RoundSettings):
    """APO's settings."""

    base: Literal["dpo", "ipo", "sppo"] = setting(
        "dpo", "the preference loss of a round, centred at the policy that sampled"
    )
    beta: float = setting(
        0.1,
        "weight of the KL to the policy that sampled; 1/beta is SPPO's step (0.001 in its code)",
        gt=0,
    )
    alpha: float = setting(
        0.3,
        "extrapolation: 0 is the iterative base method, towards 1 rounds go 1/(1 - alpha) as far",
        ge=0,
        lt=1,
        source="paper (uncertain)",
    )
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=5), "how the policy is sampled", source="SPPO's code (uncertain)"
    )


class APO(OnlinePreference):
    """Accelerated Preference Optimization (He, Yuan, Gu 2024, arXiv:2410.06293).

    Iterative DPO is a proximal-point method, and those are accelerated by momentum: after each
    round the policy moves on along the way from the last round's solution to this one's. Round t,
    with `centre` pi_t:

        solution_{t+1} = argmin over pi of the base loss around pi_t, on samples of pi_t
        theta_{t+1} = theta(solution_{t+1}) + alpha [theta(solution_{t+1}) - theta(solution_t)]
        dpo: -log sigma(beta Delta);  ipo: (Delta - 1/(2 beta))^2;
        sppo: (log pi(y)/pi_t(y) - (P(y > pi_t) - 1/2)/beta)^2, the mean of best and worst sample

    Delta is the margin of log-ratios to pi_t of the best and the worst sample. The extrapolation is
    one of weights, in float32; of log-linear policies that is the paper's
    pi_{t+1} ∝ solution_{t+1} (solution_{t+1}/solution_t)^alpha exactly, of networks nearly. The
    first round is the plain base step. Between rounds, in evaluations and at the end the policy is
    the solution; it is extrapolated when the next round begins, and the optimiser starts afresh.

    A step of the loop is a round, `epochs` times `minibatches` are its optimiser steps. Adapters
    are refused: the product of two extrapolated factors is no extrapolation. The default of alpha,
    that weights are what is extrapolated, and that the last solution is returned could not be
    checked against the paper (uncertain); no official code is known.
    """

    Config = APOSettings
    recipe = ROUNDS
    needs_centre = True
    config: APOSettings

    def __init__(self, config: APOSettings, place: Place, **given: Any):
        if config.tune == "lora":
            raise PostgradError(_ADAPTED)
        super().__init__(config, place, **given)
        if self.policy.adapted:
            raise PostgradError(_ADAPTED)
        self._solution = Snapshot(self.policy)  # of the round before
        self._begun = 0  # the round for which the policy stands at its centre

    def collect(self, step: int) -> Batch:
        self._extrapolate(step)
        return super().collect(step)

    def _extrapolate(self, step: int) -> None:
        """Move the policy from the last solution to the centre of round `step`, once."""
        if self._begun == step:  # the first round, or one that failed while it was collected
            return
        alpha, solution, centre = self.config.alpha, Snapshot(self.policy), self._solution
        centre.load_state_dict(soup([solution.weights, centre.weights], [1 + alpha, -alpha]))
        centre.restore()
        self._solution, self._begun = solution, step

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        # looking ahead leaves the optimiser without what it learnt in the round: each starts afresh
        with optimise.looking_ahead():
            metrics = super().update(batch, optimise)
            solution = Snapshot(self.policy)
        solution.restore()
        return metrics

    def losses(self, found: Compared) -> Tensor:
        centre, beta = found.others["centre"], self.config.beta
        if self.config.base == "sppo":
            return sppo(found.logprobs - centre, found.scores, beta).mean(1)
        delta = margin(found.logprobs[:, 0], found.logprobs[:, 1], centre[:, 0], centre[:, 1])
        return ipo(delta, beta) if self.config.base == "ipo" else logistic(beta * delta)

    def state_dict(self) -> dict[str, Any]:
        return {"solution": self._solution.state_dict(), "begun": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._solution.load_state_dict(state["solution"])
        self._begun = state["begun"]


_ADAPTED = "tune: apo extrapolates weights, which low-rank factors do not allow: expected full"
