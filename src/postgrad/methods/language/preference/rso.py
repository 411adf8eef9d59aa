"""Statistical Rejection Sampling Optimization."""

from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.advantages.pairing import knockout, log_odds, neighbours, rejection_select
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, NothingToLearn, Place
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.comparisons import Compared, comparison_batch
from postgrad.methods.language.online import OnlinePreference, OnlineSettings, Response
from postgrad.objectives.pairwise import hinge, logistic
from postgrad.seeding import generator
from postgrad.timing import timed


class RSOSettings(OnlineSettings):
    """RSO's settings."""

    batch_size: int = setting(8, "prompts a step, of 4 pairs each", gt=0, source="paper")
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=64, temperature=0.7, top_k=40),
        "how the candidates of a prompt are drawn",
        source="paper",
    )
    source: Literal["direct", "sft-sample-rank", "rso-sample-rank"] = setting(
        "rso-sample-rank",
        "what pairs are made of: the data's own (chosen, rejected), candidates as they come, or "
        "candidates that pass the rejection sampler",
        source="paper",
    )
    accepted: int = setting(8, "responses kept of a prompt's candidates", ge=2, source="paper")
    beta: float = setting(
        0.5, "temperature of the sampler; 0 keeps the best candidates", ge=0, source="paper"
    )
    pairing: Literal["first-round", "tournament"] = setting(
        "first-round", "disjoint pairs, or also matches between their winners", source="paper"
    )
    loss: Literal["sigmoid-norm", "hinge-norm", "hinge"] = setting(
        "sigmoid-norm", "of a pair; hinge is without a reference", source="paper"
    )
    gamma: float = setting(0.05, "factor of the margin in the loss", gt=0, source="paper")


class RSO(OnlinePreference):
    """Statistical Rejection Sampling Optimization (Liu et al. 2023, arXiv:2309.06657).

    The likelihood of preferences estimates the optimal policy pi_r ∝ pi_sft exp(r/beta) where the
    pairs are drawn from that policy, not from an unknown one as in DPO nor from pi_sft as in SLiC.
    Of N candidates of the initial policy a rejection sampler keeps n as if they came from pi_r: in
    passes over those that are left, each is accepted with probability exp((r - r_max)/beta).

        r(y) = logit P(y over y_b),   y_b the prompt's first candidate
        Delta = log pi(y_w)/pi_sft(y_w) - log pi(y_l)/pi_sft(y_l),   e = log pi(y_w)/pi(y_l)
        sigmoid-norm   L = -log sigma(gamma Delta)
        hinge-norm     L = max(0, 1 - gamma Delta)
        hinge          L = max(0, 1 - gamma e)

    The n responses are paired at random and the preference labels each pair. All this happens once
    a prompt, when it is first seen, always with the initial policy; checkpoints hold the pairs.
    `source=direct` with sigmoid-norm is DPO at gamma, `sft-sample-rank` with hinge about SLiC. The
    direct source needs a preference for its evaluations alone.

    Deviations: the preference is given, not trained here; AdamW in place of Adafactor; a prompt
    with fewer than n distinct candidates gives as many pairs as they make, perhaps none
    (the metric `pairs` shows it). No official code beyond the sampler that the paper prints.
    """

    Config = RSOSettings
    recipe = {**OnlinePreference.recipe, "learning_rate": 1e-5}
    # the policy is scored as it is: the candidates' temperature belongs to the proposal alone
    scoring_temperature = 1.0
    config: RSOSettings

    def __init__(self, config: RSOSettings, place: Place, **given: Any):
        if config.accepted > config.rollout.samples:
            raise PostgradError(
                f"accepted: at most as many as there are candidates "
                f"(rollout.samples={config.rollout.samples}), got {config.accepted}"
            )
        if config.pairing == "first-round" and config.accepted % 2:
            raise PostgradError(
                f"accepted: pairing=first-round needs an even number, got {config.accepted}"
            )
        super().__init__(config, place, **given)
        self._met = torch.zeros(len(self.prompts), dtype=torch.bool)
        self._pairs: Batch | None = None  # of the prompts met, whose numbers are `group`

    def check(self) -> None:
        super().check()
        if self.config.source != "direct":
            return
        for number, row in enumerate(self.data.rows):
            if row.get("chosen") is None or row.get("rejected") is None:
                raise PostgradError(
                    f"{self.data.where(number)}: source=direct learns from the data's pairs: "
                    f"expected the columns chosen and rejected, found {', '.join(row)}"
                )

    def losses(self, found: Compared) -> Tensor:
        if self.config.loss == "sigmoid-norm":
            return logistic(self.config.gamma * found.delta)
        if self.config.loss == "hinge-norm":
            return hinge(self.config.gamma * found.delta)
        return hinge(self.config.gamma * (found.logprobs[:, 0] - found.logprobs[:, 1]))

    def implicit_rewards(self, found: Compared) -> Tensor:
        return self.config.gamma * found.log_ratio

    def choose(self, preferences: Tensor) -> list[list[int]]:
        return (neighbours if self.config.pairing == "first-round" else knockout)(preferences)

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step)
        self._meet(index[~self._met[index]].tolist(), step)
        if self._pairs is not None:
            places = torch.isin(self._pairs.group, index).nonzero().squeeze(1)
            if len(places):
                return self._pairs.select(places).with_fields(step=torch.full_like(places, step))
        raise NothingToLearn(
            f"rollout: none of the {len(index)} prompts of step {step + 1} has 2 distinct "
            f"candidates among {self.config.rollout.samples}: there is nothing to compare"
        )

    def _meet(self, index: list[int], step: int) -> None:
        """Make the pairs of prompts that are seen for the first time."""
        if not index:
            return
        self._met[index] = True
        direct = self.config.source == "direct"
        made = self._labelled(index) if direct else self._sampled(index, step)
        if made is not None:
            known = self.with_known(made)
            self._pairs = known if self._pairs is None else self._pairs.joined(known)

    def _labelled(self, index: list[int]) -> Batch:
        """The data's own pairs, cut at the longest sample."""
        limit = self.config.rollout.max_new_tokens
        rows = [self.data.rows[i] for i in index]
        whole = [
            [self.policy.encode_response(row[name]) for name in ("chosen", "rejected")]
            for row in rows
        ]
        return comparison_batch(
            [self.prompts[i] for i in index],
            [[response[:limit] for response in pair] for pair in whole],
            torch.tensor([[1.0, 0.0]] * len(index)),
            group=torch.tensor(index),
            unlike=torch.tensor([row["chosen"] != row["rejected"] for row in rows]),
            finished=torch.tensor(
                [[len(response) <= limit for response in pair] for pair in whole]
            ),
            own=torch.zeros(len(index), 2, dtype=torch.bool),
            step=torch.zeros(len(index), dtype=torch.long),
        )

    def _sampled(self, index: list[int], step: int) -> Batch | None:
        """Pairs of the accepted candidates, each labelled by the preference."""
        with self.policy.reference():
            drawn = self.roll_out([self.prompts[i] for i in index], "candidates", step)
        size = self.config.rollout.samples
        pools = [_distinct(drawn.texts, i * size, (i + 1) * size) for i in range(len(index))]
        groups = self._accepted(index, drawn.texts, pools)
        paired = [i for i, group in enumerate(groups) if len(group) > 1]
        if not paired:
            return None
        rows = [index[i] for i in paired]
        batch = self.judged(rows, [Response.sampled(drawn, groups[i]) for i in paired], step)
        return batch.with_fields(group=torch.tensor(rows)[batch.group])

    def _accepted(
        self, index: list[int], texts: list[str], pools: list[list[int]]
    ) -> list[list[int]]:
        """The places in `texts` of each prompt's accepted candidates, in random order."""
        rejecting = self.config.source == "rso-sample-rank"
        if rejecting:
            with timed("reward"):
                said = self.preference(
                    [self.data.rows[i] for i, pool in zip(index, pools, strict=True) for _ in pool],
                    [texts[place] for pool in pools for place in pool],
                    [texts[pool[0]] for pool in pools for _ in pool],
                )
            rewards = log_odds(torch.tensor(said, dtype=torch.float64)).split(list(map(len, pools)))
        accepted = []
        for i, pool in enumerate(pools):
            count = min(self.config.accepted, len(pool))
            count -= count % 2 if self.config.pairing == "first-round" else 0
            random = generator(self.place.seed, "accepted", index[i])
            chosen = list(range(count))
            if rejecting and count:
                chosen = rejection_select(rewards[i], count, self.config.beta, random)
            order = torch.randperm(count, generator=random).tolist()
            accepted.append([pool[chosen[place]] for place in order])
        return accepted

    def describe_batch(self, batch: Batch) -> Metrics:
        return {**super().describe_batch(batch), "pairs": float(len(batch))}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"met": self._met}
        if self._pairs is not None:
            fields = self._pairs.fields()
            del fields["prompts"]
            tokens = [response for pair in fields["responses"] for response in pair]
            state["pairs"] = {**fields, "responses": torch.cat(tokens)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._met.copy_(state["met"])
        if "pairs" in state:
            fields = dict(state["pairs"])
            tokens = fields.pop("responses").to(self.place.device)
            several = tokens.split(fields["lengths"].flatten().tolist())
            self._pairs = Batch(
                prompts=[self.prompts[i] for i in fields["group"]],
                responses=[list(pair) for pair in zip(several[::2], several[1::2], strict=True)],
                **fields,
            )


def _distinct(texts: list[str], start: int, stop: int) -> list[int]:
    """The places from `start` up to `stop` where a text comes for the first time."""
    first: dict[str, int] = {}
    for place in range(start, stop):
        first.setdefault(texts[place], place)
    return list(first.values())
