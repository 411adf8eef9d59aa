"""HAPO: History-Aware Policy Optimization."""

import hashlib
import json
from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.advantages.history import (
    HistoryMode,
    HistoryTracker,
    LengthForm,
    history_length_reward,
    repetition_penalty,
)
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import Given, RolloutSettings
from postgrad.methods.language.verifiable.grpo import GRPO, GRPOSettings
from postgrad.sampling.generation import Rollouts


class HAPOSettings(GRPOSettings):
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=4, temperature=0.7),
        "how the policy is sampled",
        source="official code",
    )
    kl_coefficient: float = setting(
        0.04, "weight of the KL to the initial policy", ge=0, source="TRL's then (uncertain)"
    )
    length_weight: float = setting(
        1.0, "w: weight of the length reward", ge=0, le=1, source="official script"
    )
    length_form: LengthForm = setting("cosine", "of the length reward", source="official script")
    length_floor: float = setting(
        -0.7, "c: least length reward of a correct response", gt=-1, le=0, source="official code"
    )
    length_tolerance: float = setting(
        0.1, "with form linear, how far over the record is free", ge=0, source="official code"
    )
    history: HistoryMode = setting(
        "min", "the record: shortest correct response so far, or their mean", source="official code"
    )
    id_column: str | None = setting(
        None, "the data's column of prompt ids, none twice; if empty, the prompt is its own id"
    )
    repetition_penalty: float = setting(
        0.0, "for all tokens of a response in repeated n-grams", le=0, source="official code"
    )
    repetition_size: int = setting(3, "n of these n-grams", gt=0, source="official code")


class HAPO(GRPO):
    """HAPO: History-Aware Policy Optimization (Huang et al. 2025, arXiv:2505.11225).

    Correct answers become shorter over epochs: each is measured by the shortest correct response h
    that this prompt ever had, not by one budget for all. Wrong responses gain nothing by being
    short, and lose nothing while they are no longer than h, so short attempts are free. With l the
    length in tokens, the end token not counted,

        f     = cos(min(pi/2 l/h, pi))
        r_len = max(f, c) if correct, min(f, 0) if wrong, 0 before the first correct response
        r     = r_correct + w r_len

    followed by GRPO on r. With w ≤ 1 and c = -0.7 any correct response is worth more than any wrong
    one. The record is updated after all responses of a step are judged and is part of checkpoints;
    evaluation does not touch it. Responses that were cut count as wrong. A response is correct if
    its reward is at least 1. `history=mean` is a running mean; the released code's rounds it down
    to a whole number at every update. `length_form=linear` is the paper's other form.

    Prompts are known by `id_column`, or by their own text, so equal prompts share a record.
    """

    Config = HAPOSettings
    config: HAPOSettings

    def __init__(
        self, config: HAPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        super().__init__(config, place, reward=reward, **given)
        self.tracker = HistoryTracker(config.history)
        if config.id_column is not None:
            self._require_ids(config.id_column)

    def _require_ids(self, column: str) -> None:
        """Stop unless every row has an id of its own."""
        places: dict[Any, int] = {}
        for place, row in enumerate(self.data.rows):
            key = row.get(column)
            if key is None:
                raise PostgradError(
                    f"id_column: {self.data.where(place)} has no {column!r}; the columns are "
                    f"{', '.join(self.data.columns)}"
                )
            if str(key) in places:
                raise PostgradError(
                    f"id_column: {self.data.where(place)} has the {column!r} of row "
                    f"{self.data.numbers[places[str(key)]]}, {str(key)!r}: every prompt needs one "
                    "of its own"
                )
            places[str(key)] = place

    def identity(self, row: dict[str, Any]) -> str:
        """The id of a row's prompt, the same in every run."""
        if self.config.id_column is not None:
            return str(row[self.config.id_column])
        return hashlib.sha256(json.dumps(row["prompt"]).encode()).hexdigest()[:16]

    def judge(
        self, rows: list[dict[str, Any]], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        reward, terms = super().judge(rows, rollouts)
        reward = torch.where(rollouts.finished, reward, reward.clamp(max=0))
        correct = reward >= 1
        lengths = torch.tensor([self._length(response) for response in rollouts.responses])
        ids = [self.identity(row) for row in rows]
        shaped = history_length_reward(
            lengths,
            self.tracker.lookup(ids),
            correct,
            config.length_form,
            config.length_floor,
            config.length_tolerance,
        )
        # after all are judged: a group is not measured by its own members
        self.tracker.update(ids, lengths, correct)
        terms = {**terms, "length": shaped}
        total = reward + config.length_weight * shaped
        if config.repetition_penalty < 0:
            repeated = [
                repetition_penalty(response, config.repetition_size, config.repetition_penalty)
                for response in rollouts.responses
            ]
            terms["repetition"] = torch.tensor(repeated)
            total = total + terms["repetition"]
        return total, terms

    def _length(self, response: Tensor) -> int:
        """Tokens without the end; an empty response counts as one of one."""
        ended = int(response[-1]) in self.policy.end_tokens
        return max(len(response) - ended, 1)

    def describe_batch(self, batch: Batch) -> Metrics:
        known = {"history/prompts": float(len(self.tracker))}
        if len(self.tracker):
            known["history/length"] = self.tracker.mean
        return {**super().describe_batch(batch), **known}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "history": self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.tracker.load_state_dict(state["history"])
