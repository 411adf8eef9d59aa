"""Direct Nash Optimization."""

from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.advantages.pairing import clear_pairs, win_rates
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import Metrics
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.games.rounds import ROUNDS, RoundSettings
from postgrad.methods.language.online import OnlinePreference
from postgrad.objectives.iterative import geometric_centre, soft_pair
from postgrad.objectives.pairwise import logistic, margin


class DNOSettings(RoundSettings):
    """DNO's settings."""

    beta: float = setting(
        0.1,
        "eta, weight of the KL to the policy that sampled: the inverse step size",
        gt=0,
        source="paper (0.1 or 0.05)",
    )
    form: Literal["hard", "soft"] = setting(
        "hard",
        "hard: clear pairs, the better response as DPO's chosen one; soft: all pairs, with win "
        "rates as targets",
        source="paper, algorithms 2 and 1",
    )
    reference_share: float = setting(
        0.0,
        "tau/eta of the regularised form, whose centre is drawn towards the reference",
        ge=0,
        le=1,
        source="paper, algorithm 1; appendix A for more than 0",
    )
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=5, temperature=0.7, top_p=0.95),
        "how the policy is sampled",
        source="paper",
    )
    teacher: str = setting(
        "completion", "column with a teacher's response, compared along where a row has one"
    )
    least_win_rate: float = setting(0.5, "hard: how often the better response must win", ge=0, le=1)
    lead: float = setting(
        0.4,
        "hard: win rate by which the better response must lead",
        ge=0,
        le=1,
        source="paper: 2 of a judge's 5 steps",
    )
    own_lead: float = setting(
        0.2,
        "hard: the same where the better response is the policy's own",
        ge=0,
        le=1,
        source="paper: 1 of a judge's 5 steps",
    )


class DNO(OnlinePreference):
    """Direct Nash Optimization (Rosset et al. 2024, arXiv:2404.03715).

    Soft policy iteration on a preference game, pi_{t+1} ∝ pi_t exp(r_t/eta), where r_t(y) is the
    win rate of y against pi_t. Its inner problem becomes a regression of pairs of samples: the
    policy's implicit reward is fitted to r_t in differences, by a logistic loss.

        Delta = eta [log pi(y_1)/pi_t(y_1) - log pi(y_2)/pi_t(y_2)],   eta = beta
        soft: L = -q log sigma(Delta) - (1 - q) log sigma(-Delta),  q = sigma(r_t(y_1) - r_t(y_2))
        hard: L = -log sigma(Delta), of pairs whose better response y_1 leads by a margin

    The hard form is iterative DPO on the clear pairs; the paper's experiments use it. r_t is the
    mean over the other responses of the prompt, a teacher's among them where the data have a column
    of them; the policy's own samples may win against the teacher, and need a smaller lead. A step
    of the loop is a round, `epochs` times `minibatches` are its optimiser steps.

    `reference_share` replaces pi_t by pi_t^(1 - share) pi_ref^share in the centre (not as the
    opponent, which would have to be sampled). Deviations: leads are those of win rates, where the
    paper takes a judge's scores from 1 to 6 (a positive then needs 5); pairs of earlier rounds are
    not replayed; the last policy is kept, not the best on validation prompts (the guarantee is one
    for the average of all rounds); log-probabilities are those at the sampling temperature; the
    printed learning rate, 5e-5, is not the default. No official code is known.
    """

    Config = DNOSettings
    recipe = ROUNDS
    needs_centre = True
    config: DNOSettings

    def given_responses(self, row: dict[str, Any]) -> list[str]:
        text = row.get(self.config.teacher)
        return [text] if isinstance(text, str) and text else []

    def choose(self, preferences: Tensor) -> list[list[int]]:
        wins = win_rates(preferences)
        if self.config.form == "soft":
            return clear_pairs(wins, 0.0)
        leads = torch.full_like(wins, self.config.lead)
        leads[: self.config.rollout.samples] = self.config.own_lead
        return clear_pairs(wins, leads, self.config.least_win_rate)

    def losses(self, found: Compared) -> Tensor:
        eta = self.config.beta
        centre = geometric_centre(
            found.others["centre"], found.reference, self.config.reference_share
        )
        if self.config.form == "soft":
            return soft_pair(found.logprobs, centre, found.scores, eta)
        delta = margin(found.logprobs[:, 0], found.logprobs[:, 1], centre[:, 0], centre[:, 1])
        return logistic(eta * delta)

    def describe_batch(self, batch: Batch) -> Metrics:
        """Also the share of pairs in which the policy's own sample is the better response."""
        return {
            **super().describe_batch(batch),
            "pairs": len(batch),
            "pairs/own_better": float(batch.own[:, 0].float().mean()),
        }
