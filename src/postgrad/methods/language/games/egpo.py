"""Extragradient Preference Optimization."""

from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.language.base import RolloutSettings, draw_responses
from postgrad.methods.language.comparisons import Compared, comparison_batch
from postgrad.methods.language.online import OnlinePreference, OnlineSettings
from postgrad.objectives.game import online_ipo
from postgrad.timing import timed


class EGPOSettings(OnlineSettings):
    """EGPO's settings."""

    rollout: RolloutSettings = setting(
        RolloutSettings(samples=2, temperature=2.0, top_k=10),
        "how the responses that are learnt from are sampled, in pairs: widely, in place of "
        "uniformly; their opponents have temperature 1 and no restrictions",
        source="official code",
    )
    beta: float = setting(0.1, "strength of the KL to the reference", gt=0, source="official code")
    look_ahead: bool = setting(
        True, "off: one plain step, online mirror descent (the paper's online IPO 1)"
    )
    mixture: float = setting(
        0.0,
        "the reference's share in the opponents; 0.125 without looking ahead is Nash-MD in the "
        "form of this loss",
        ge=0,
        le=1,
        source="official code",
    )
    length_normalised: bool = setting(
        True, "log-probabilities are means over a response's tokens, not sums",
        source="official code",
    )  # fmt: skip
    epochs: Literal[1] = setting(1, "one: every step has opponents of its own")
    minibatches: Literal[1] = setting(1, "one, for the same reason")


class EGPO(OnlinePreference):
    """Extragradient Preference Optimization (Zhou, Fazel, Du 2025, arXiv:2503.08942).

    Mirror descent against oneself circles around the equilibrium of a preference game, and away
    from it where the KL to the reference is weak. A look-ahead step first shows where the policy
    would go; the policy of before then steps against that one. The last iterate converges
    linearly, and each step is a regression:

        d  =  log pi/pi_ref(y) - log pi/pi_ref(y')
        L(theta; m)  =  ( d - [P(y > m) - P(y' > m)] / beta )^2          (mean over pairs)
        ahead        =  theta - lr grad L(theta; pi_theta)
        theta       <-  theta - lr grad L(theta; pi_ahead)

    P(y > m) is the preference over one response of m. In the second step responses and opponents
    are drawn anew, all by the policy ahead; then weights and optimiser are those of before, and
    the step is made from there. One step of the loop is both, so it costs two optimiser steps.

    The theory draws y, y' uniformly from all responses; here, as in the official code, from the
    policy at a high temperature, and `length_normalised` divides log-probabilities, so also d, by
    the lengths: beta then weighs against a preference per token. Deviation: the learning rate's
    schedule advances once for both half steps.
    """

    Config = EGPOSettings
    recipe = {
        **OnlinePreference.recipe, "learning_rate": 5e-7, "clip_norm": 1.0, "weight_decay": 0.01,
    }  # fmt: skip
    config: EGPOSettings

    def __init__(self, config: EGPOSettings, place: Place, **given: Any):
        if config.rollout.samples % 2:
            raise PostgradError(
                f"rollout.samples: responses are learnt from in pairs, expected an even number, "
                f"got {config.rollout.samples}"
            )
        super().__init__(config, place, **given)
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self.opponent_rollout = config.rollout.model_copy(
            update={"samples": config.rollout.samples // 2, **plain}
        )

    @property
    def scoring_temperature(self) -> float:
        """What is learnt is the policy at temperature 1, however widely it was sampled."""
        return 1.0

    def collect(self, step: int) -> Batch:
        return self.drawn(step, "now")

    def drawn(self, step: int, half: str) -> Batch:
        """Pairs and their preferences over opponents, all by the policy as it is, best first."""
        index = self.order.indices(step).tolist()
        prompts = [self.prompts[i] for i in index]
        own = self.roll_out(prompts, "rollout", half, step)
        others = draw_responses(
            self.policy, prompts, self.opponent_rollout, self.place.seed, "opponent", half, step,
            mixture=self.config.mixture,
        )  # fmt: skip
        size = self.config.rollout.samples
        rows = [self.data.rows[i] for i in index for _ in range(size)]
        with timed("reward"):
            wins = torch.tensor(
                self.preference(rows, own.texts, [text for text in others.texts for _ in range(2)])
            ).view(-1, 2)
        order = wins.argsort(dim=1, descending=True, stable=True)
        places = order + 2 * torch.arange(len(wins))[:, None]
        batch = comparison_batch(
            own.prompts[::2],
            [[own.responses[i] for i in pair] for pair in places.tolist()],
            wins.gather(1, order),
            unlike=torch.tensor([own.texts[i] != own.texts[i + 1] for i in range(0, len(rows), 2)]),
            finished=own.finished[places],
            step=torch.full((len(wins),), step),
        )
        return self.with_known(batch)

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        if not self.config.look_ahead:
            return optimise(self.loss, batch)
        with optimise.looking_ahead():
            tried = optimise(self.loss, batch)
            with optimise.autocast():
                ahead = self.drawn(int(batch.step[0]), "ahead")
        return {**optimise(self.loss, ahead), "look_ahead/loss": tried["loss"]}

    def losses(self, found: Compared) -> Tensor:
        ratio = found.log_ratio
        if self.config.length_normalised:
            ratio = ratio / found.lengths
        wins = found.scores
        return online_ipo(ratio[:, 0] - ratio[:, 1], wins[:, 0], wins[:, 1], self.config.beta)
