"""Nash Learning from Human Feedback."""

from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import FourParts, Metrics, Optimise, Place
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.online import OnlinePreference, OnlineSettings
from postgrad.models.snapshots import Snapshot
from postgrad.objectives.game import KLCredit, nash_weights
from postgrad.objectives.policy_gradient import reinforce
from postgrad.sampling.generation import Rollouts
from postgrad.timing import timed


class NashMDSettings(OnlineSettings):
    """Nash-MD-PG's settings."""

    rollout: RolloutSettings = setting(
        RolloutSettings(samples=1), "how the policy and, as often, its opponent are sampled"
    )
    beta: float = setting(
        0.008, "tau, strength of the KL to the reference", ge=0, source="paper, appendix G"
    )
    opponent: Literal["mixture", "average"] = setting(
        "mixture", "geometric mixture of policy and reference, or moving average of the weights "
        "(Nash-EMA-PG)", source="paper"
    )  # fmt: skip
    mixture: float = setting(
        0.125,
        "the reference's share in the opponent; 0: self-play, 1: the reference (TRL: 0.5)",
        ge=0,
        le=1,
        source="paper: 0.125 to 0.375 were best",
    )
    decay: float = setting(
        0.999, "of the moving average; 1: the start", ge=0, le=1, source="paper, appendix G"
    )
    kl: KLCredit = setting(
        "sequence",
        "a token answers for the log-ratio of the whole response, or for its own alone (TRL)",
        source="paper",
    )
    epochs: Literal[1] = setting(1, "one: the gradient holds at the policy that sampled")
    minibatches: Literal[1] = setting(1, "one, for the same reason")


class NashMD(OnlinePreference):
    """Nash-MD-PG (Munos, Valko, Calandriello et al. 2023, arXiv:2312.00886).

    Where preferences go in circles no reward represents them, and what a reward fitted to them
    says is best depends on the data it was fitted to. A preference P(y > y') still has an
    equilibrium: the policy to which no other is preferred, with a KL to the reference mu against
    the drift. The policy gradient of P against an opponent finds it; with the opponent taken to be
    a geometric mixture of policy and reference, the last iterate converges.

        pi_b  ∝  pi^(1 - b) mu^b                           (of every next token)
        y ~ pi,  y' ~ pi_b
        w  =  P(y > y') - 1/2 - tau log pi(y)/mu(y)        (constant)
        L  =  -w log pi(y)                                 (sums over tokens, mean over responses)

    With b = 0 it is self-play; with b = 1, the best response to the reference.
    `opponent=average` is Nash-EMA-PG, whose opponent has the moving average of the weights,
    bar_{t+1} = (1 - decay) theta_t + decay bar_t (uncertain: the exact recursion). No official
    code is known; checked against TRL, whose `kl=token` charges every token its own log-ratio
    alone, which is not the gradient of the KL. The mixture is that of next tokens, as in TRL.
    The policy is the one at the sampling temperature; top-k and top-p make its gradient biased.
    """

    Config = NashMDSettings
    recipe = {**OnlinePreference.recipe, "learning_rate": 5e-7}
    parts = FourParts(
        mask="none",
        denominator="none: one step on the policy's own samples",
        advantage="P(y > y') - 1/2 - tau log-ratio to the reference, y' from the opponent",
        gradient="sequence log-likelihood",
    )
    least_samples = 1
    config: NashMDSettings

    def __init__(self, config: NashMDSettings, place: Place, **given: Any):
        super().__init__(config, place, **given)
        self.average = Snapshot(self.policy) if config.opponent == "average" else None

    def opponents(self, prompts: list[Tensor], step: int) -> Rollouts:
        """As many responses of the opponent as there are of the policy."""
        if self.average is None:
            return self.roll_out(prompts, "opponent", step, mixture=self.config.mixture)
        with self.average.acting():
            return self.roll_out(prompts, "opponent", step)

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step).tolist()
        prompts = [self.prompts[i] for i in index]
        own, others = self.roll_out(prompts, "rollout", step), self.opponents(prompts, step)
        rows = [self.data.rows[i] for i in index for _ in range(self.config.rollout.samples)]
        with timed("reward"):
            wins = self.preference(rows, own.texts, others.texts)
        lengths = torch.tensor([len(response) for response in own.responses])
        return Batch(
            prompts=own.prompts,
            responses=own.responses,
            texts=own.texts,
            opponents=others.texts,
            wins=torch.tensor(wins),
            mask=torch.arange(int(lengths.max()))[None, :] < lengths[:, None],
            cost=lengths + torch.tensor([len(prompt) for prompt in own.prompts]),
            finished=own.finished,
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        score = self.policy.score
        now = score(batch.prompts, batch.responses, temperature=self.scoring_temperature)
        with self.policy.reference():
            before = score(batch.prompts, batch.responses, temperature=self.scoring_temperature)
        log_ratio = now.logprobs.detach() - before.logprobs
        wins = batch.wins.to(log_ratio)
        weights = nash_weights(wins, log_ratio, now.mask, self.config.beta, self.config.kl)
        losses = reinforce(now.logprobs, weights, now.mask).sum(1)
        return losses.sum() / batch.items, {"kl_to_reference": float(log_ratio.sum(1).mean())}

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        if self.average is not None:
            self.average.follow(1 - self.config.decay)
        return optimise(self.loss, batch)

    def describe_batch(self, batch: Batch) -> Metrics:
        return {
            "win_rate": float(batch.wins.mean()),
            "response/length": float(batch.mask.sum(1).float().mean()),
            "response/truncated": float((~batch.finished).float().mean()),
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.policy.decode(batch.prompts[i]),
                "response": batch.texts[i],
                "opponent": batch.opponents[i],
                "preferred with probability": float(batch.wins[i]),
            }
            for i in range(min(len(batch), 4))
        ]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.average is not None:
            self.average.load_state_dict(state["average"])
