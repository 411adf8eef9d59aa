"""Mixed preference optimisation."""

import json
import warnings
from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.advantages.selection import Disagreement, GapSplit, gap_split
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import Given
from postgrad.methods.language.comparisons import (
    compared,
    comparison_batch,
    comparison_metrics,
    encoded_responses,
    known_logprobs,
    pair_rows,
)
from postgrad.methods.language.rlhf.actor_critic import ActorCritic, ActorCriticSettings
from postgrad.models.snapshots import Snapshot
from postgrad.objectives.pairwise import logistic
from postgrad.sampling.epochs import Epochs
from postgrad.timing import timed

_SCORED = 256  # responses in one call of the reward
_LEAST_AGREEMENT = 0.55  # share of pairs that the reward orders as their labels do


class MixedPOSettings(ActorCriticSettings):
    """Mixed preference optimisation's settings."""

    data: DataSettings = setting(DataSettings(name="docstrings"), "preferences")
    gamma: float | None = setting(
        None, "pairs are easy where the reward's gap exceeds it; if empty, gap_quantile decides "
        "(paper: about 2 on HH-RLHF and 1 on TLDR (uncertain))", ge=0
    )  # fmt: skip
    gap_quantile: float = setting(
        0.5, "share of the pairs that are hard: the quantile of the gaps' sizes", gt=0, lt=1
    )
    disagreement: Disagreement = setting(
        "drop", "what becomes of easy pairs whose label the reward contradicts"
    )
    dpo_steps: int = setting(100, "steps of DPO on the easy pairs, before all others", gt=0)
    dpo_batch_size: int = setting(32, "pairs a step", gt=0)
    dpo_beta: float = setting(0.1, "beta of DPO", gt=0, source="DPO paper")
    kl_coefficient: float = setting(
        0.05, "beta_2, of the KL to the DPO model, in each token's reward", ge=0, source="TRL"
    )


class MixedPO(ActorCritic):
    """Mixed preference optimisation (Gou, Nguyen 2024, arXiv:2403.19443).

    DPO suffers from pairs that are nearly ties, whose labels are mostly noise; PPO explores slowly
    from a weak start. So a reward splits the pairs by its gap g = r(x, y_w) - r(x, y_l). DPO
    learns from the easy ones, then PPO on the prompts of the hard ones, starting at the DPO model
    and held near it (first line, easy; second line, hard):

        |g| > gamma:  L = -log sigma(beta [log pi(y_w)/pi_SFT(y_w) - log pi(y_l)/pi_SFT(y_l)])
        |g| <= gamma: max E_{y ~ pi} r(x, y) - beta_2 KL(pi || pi_DPO)

    In tables, with a reward that also labelled the pairs, the optimum of the second stage is
    pi_SFT exp(r (1/beta + 1/beta_2)) / Z. A prompt of several hard pairs counts once.

    The paper's equations beyond these could not be read: that the split is by |g| is (uncertain),
    and what becomes of easy pairs whose label the reward contradicts is a choice (`disagreement`).
    One optimiser and learning rate serve both stages. A reward is best given as a model of other
    pairs than those it splits: it has memorised the gaps of its own. The critic starts from the
    initial policy's body, or from the reward model by `critic=`. KL in evaluations is to the
    present reference, and `kl_to_start` to the initial policy throughout.
    """

    Config = MixedPOSettings
    recipe = {**ActorCritic.recipe, "steps": 200}
    data_format = "preferences"
    config: MixedPOSettings

    def __init__(
        self, config: MixedPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        if config.tune == "lora":
            raise PostgradError(
                "tune: expected full, got lora: after the first stage the reference is what it "
                "has learnt, and with an adapter it is always the base model"
            )
        super().__init__(config, place, reward=reward, **given)
        self.start = Snapshot(self.policy) if self.frontier is not None else None
        self.switched = False  # to the second stage
        limit = config.rollout.max_new_tokens
        self.encoded = [
            encoded_responses(
                self.policy,
                [row["chosen"], row["rejected"]],
                limit,
                "rollout.max_new_tokens",
                self.data.where(number),
            )
            for number, row in enumerate(self.data.rows)
        ]

    def check(self) -> None:
        """The split is made here: what it leaves empty is known before any step."""
        super().check()
        if self.place.steps <= self.config.dpo_steps:
            raise PostgradError(
                f"steps: expected more than dpo_steps = {self.config.dpo_steps}, after which PPO "
                f"begins, got {self.place.steps}"
            )
        self._take_up(self._split_by_reward())

    def _split_by_reward(self) -> GapSplit:
        config = self.config
        chosen, rejected = (self._worth(column) for column in ("chosen", "rejected"))
        agreement = float(0.5 * ((chosen - rejected).sign() + 1).mean())
        if agreement < _LEAST_AGREEMENT:
            warnings.warn(
                f"the reward orders {agreement:.0%} of the pairs as their labels do: is it meant "
                "for these data, and does it read them as it was trained to?",
                stacklevel=2,
            )
        split = gap_split(
            chosen,
            rejected,
            config.gamma,
            quantile=config.gap_quantile,
            disagreement=config.disagreement,
        )
        for kind, pairs in (("easy", split.easy), ("hard", split.hard)):
            if not len(pairs):
                key = "gap_quantile" if config.gamma is None else "gamma"
                raise PostgradError(
                    f"{key}: no pair of {self.data.name} is {kind}: the gaps of the reward are "
                    f"{float((chosen - rejected).abs().min()):.4g} to "
                    f"{float((chosen - rejected).abs().max()):.4g} in size, gamma is "
                    f"{split.gamma:.4g}"
                )
        return split

    def _worth(self, column: str) -> Tensor:
        """The reward `[N]` of the responses in a column of the data."""
        values: list[float] = []
        with timed("reward"):
            for first in range(0, len(self.data), _SCORED):
                rows = self.data.rows[first : first + _SCORED]
                place = 0 if column == "chosen" else 1
                ids = [pair[place].tolist() for pair in self.encoded[first : first + _SCORED]]
                texts = [row[column] for row in rows]
                values += self.reward.functions.of_rows(rows, texts, ids)[0]
        return torch.tensor(values, dtype=torch.float64)

    def _take_up(self, split: GapSplit) -> None:
        config, seed = self.config, self.place.seed
        self.split = split
        prompts = {json.dumps(self.data.rows[i]["prompt"]): i for i in split.hard.tolist()}
        self.hard = torch.tensor(list(prompts.values()))
        self.hard_order = Epochs(len(self.hard), config.batch_size, seed)
        self.easy_order = Epochs(len(split.easy), config.dpo_batch_size, seed)

    def collect(self, step: int) -> Batch:
        dpo_steps = self.config.dpo_steps
        if step < dpo_steps:
            return self._pairs(step)
        if not self.switched:
            self.policy.freeze_reference()
            self.switched = True
        rows = self.hard[self.hard_order.indices(step - dpo_steps)]
        return self.collected(rows.tolist(), step)

    def _pairs(self, step: int) -> Batch:
        """Easy pairs, with the reference's log-probabilities."""
        index = self.split.easy[self.easy_order.indices(step)]
        turned = torch.isin(index, self.split.swapped).tolist()
        pairs = [self.encoded[i] for i in index.tolist()]
        batch = comparison_batch(
            [self.prompts[i] for i in index.tolist()],
            [pair[::-1] if turn else pair for pair, turn in zip(pairs, turned, strict=True)],
        )
        with self.policy.reference():
            return batch.with_fields(reference=known_logprobs(self.policy, batch))

    def pair_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """DPO's, in the first stage."""
        found = compared(self.policy, batch)
        value = logistic(self.config.dpo_beta * found.delta).sum() / batch.items
        return value, comparison_metrics(self.config.dpo_beta * found.log_ratio, found)

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        if _is_of_pairs(batch):
            return optimise(self.pair_loss, batch, "policy")
        return super().update(batch, optimise)

    def describe_batch(self, batch: Batch) -> Metrics:
        if not _is_of_pairs(batch):
            return super().describe_batch(batch)
        return {
            "split/easy": float(len(self.split.easy)),
            "split/hard": float(len(self.split.hard)),
            "split/dropped": float(len(self.split.dropped)),
            "split/swapped": float(len(self.split.swapped)),
            "split/gamma": self.split.gamma,
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return pair_rows(self.policy, batch) if _is_of_pairs(batch) else super().samples(batch)

    def evaluate(self) -> Metrics:
        """Reward of fresh samples, and their KL to the present reference and to the start."""
        if self.frontier is None or self.start is None:
            return {}
        return self.frontier.measure(self.policy, {"start": self.start})

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "split": vars(self.split),
            "reference": self.policy.reference_weights if self.switched else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._take_up(GapSplit(**state["split"]))
        if state["reference"] is not None:
            self.policy.freeze_reference(state["reference"])
            self.switched = True


def _is_of_pairs(batch: Batch) -> bool:
    return "present" in batch
