"""Preference methods: one blank, the loss of the responses to a prompt."""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError, shown
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import Given, LanguageSettings, find_materials, render_prompts
from postgrad.methods.language.comparisons import (
    SCORING_TOKENS,
    Compared,
    accuracy,
    better,
    compared,
    comparison_batch,
    comparison_metrics,
    encoded_responses,
    known_logprobs,
    last,
)
from postgrad.methods.language.frontier import Frontier, FrontierSettings
from postgrad.models.language import LanguagePolicy
from postgrad.models.text_network import TextNetwork
from postgrad.tasks import Examples

PAIR_SCORES = ("score_chosen", "score_rejected")  # as UltraFeedback's binarised form calls them


class ComparisonSettings(LanguageSettings):
    """Settings of every method that reads compared responses."""

    data: DataSettings = setting(DataSettings(name="docstrings"), "preferences or rankings")
    batch_size: int = setting(16, "pairs (or lists) a step", gt=0)
    max_response_tokens: int = setting(256, "longer responses are cut", gt=0)


class PreferenceSettings(ComparisonSettings):
    """Settings of the methods that teach a policy by compared responses."""

    beta: float = setting(0.1, "strength of the KL to the reference", gt=0, source="DPO paper")
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


class Comparisons:
    """Tokenised responses to prompts, with the reference's log-probabilities once they are known.

    Pairs are lists of two, labelled responses lists of one. `scores` come from the column `scores`
    of rankings (or are minus their `ranks`), and from `score_chosen` and `score_rejected` of
    preferences. `graded` says whether any tell more than an order, as ranks do not.
    """

    def __init__(self, policy: TextNetwork, examples: Examples, config: ComparisonSettings):
        limit = config.max_response_tokens
        self.examples = examples
        self.prompts = render_prompts(policy, examples, config, reserve=limit)
        self.responses = [
            encoded_responses(
                policy,
                _texts(examples.format, row),
                limit,
                "max_response_tokens",
                examples.where(number),
            )
            for number, row in enumerate(examples.rows)
        ]
        width = max(map(len, self.responses))
        self.scores = torch.full((len(examples), width), torch.nan)
        for number, row in enumerate(examples.rows):
            scores = _scores(row, examples.where(number))
            self.scores[number, : len(scores)] = torch.tensor(scores)
        ranked = "ranks" in examples.columns and "scores" not in examples.columns
        self.graded = not ranked and not bool(self.scores.isnan().all())
        self.reference = torch.full((len(examples), width), torch.nan)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, index: Tensor) -> Batch:
        rows = index.tolist()
        responses = [self.responses[i] for i in rows]
        width = max(map(len, responses))
        return comparison_batch(
            [self.prompts[i] for i in rows],
            responses,
            self.scores[index, :width],
            reference=self.reference[index, :width],
            index=index,
        )

    def know_reference(self, policy: LanguagePolicy, index: Tensor) -> None:
        """Score with the reference policy what it has not been asked about before."""
        unknown = index[self.reference[index, 0].isnan()]
        if len(unknown):
            batch = self.batch(unknown)
            with policy.reference():
                known = known_logprobs(policy, batch)
            self.reference[unknown, : known.shape[1]] = known


def _texts(format: str, row: dict[str, Any]) -> list[str]:
    if format == "preferences":
        return [row["chosen"], row["rejected"]]
    return [row["completion"]] if format == "labelled" else row["responses"]


def _scores(row: dict[str, Any], where: str) -> list[float]:
    if "completion" in row:  # one of a pair that was labelled
        return []
    pair = [_number(row, name, where) for name in PAIR_SCORES if row.get(name) is not None]
    pair = pair if len(pair) == len(PAIR_SCORES) else []
    if "chosen" in row:
        return pair
    if "scores" in row:
        return [float(score) for score in row["scores"]]
    if "ranks" in row:
        return [-rank for rank in row["ranks"]]
    # a pair read as a ranking: scores that contradict its order say nothing
    return pair if pair and pair[0] > pair[1] else []


def _number(row: dict[str, Any], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise PostgradError(
            f"{where}: column {column!r} holds {shown(row[column])}, expected a number"
        )
    return value


class PreferenceMethod(Method):
    """Learns from compared responses; a subclass fills `losses`.

    The reference is the frozen initial policy (with LoRA: the adapter switched off). Its
    log-probabilities are computed when a prompt is first seen and kept, also in checkpoints.
    """

    recipe = {
        "precision": "auto",
        "learning_rate": 1e-6,
        "clip_norm": 10.0,
        "warmup_steps": 10,
        "steps": 100,
    }
    data_format: ClassVar[str | tuple[str, ...]] = "preferences"  # or rankings, for lists
    needs_reference: ClassVar[bool] = True
    config: PreferenceSettings

    def __init__(self, config: PreferenceSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place)
        found = find_materials(config, place, self.data_format, given)
        self.policy, self.order = found.policy, found.order
        self.data = Comparisons(self.policy, found.data, config)
        self.held_out = Comparisons(self.policy, found.held_out, config) if found.held_out else None
        self.frontier = Frontier.of(config, config.frontier, found, place)
        if self.needs_reference or self.frontier:
            self.policy.freeze_reference()

    @abstractmethod
    def losses(self, found: Compared) -> Tensor:
        """The loss `[B]` of each prompt's responses."""

    def terms(self, found: Compared) -> dict[str, Tensor]:
        """The terms `[B]` of a loss that has several, by name: reported besides their sum."""
        return {}

    def implicit_rewards(self, found: Compared) -> Tensor:
        """What the policy thinks of the responses, `[B, K]`: for metrics and accuracy."""
        return self.config.beta * found.log_ratio

    def check(self) -> None:
        if self.data_format == "rankings":
            everything = self.data.batch(torch.arange(len(self.data)))
            if self.describe_batch(everything)["list/without_order"] == len(everything):
                raise PostgradError(
                    f"{self.data.examples.name}: the scores within every list are equal, so there "
                    "is no order to learn from"
                )

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def collect(self, step: int) -> Batch:
        return self._batch(self.data, self.order.indices(step))

    def describe_batch(self, batch: Batch) -> Metrics:
        """Of lists: how long they are on average, and how many have no order to learn from."""
        if self.data_format != "rankings":
            return {}
        ordered = better(batch.scores, batch.present).any(-1).any(-1)
        return {
            "list/responses": float(batch.present.sum(1).float().mean()),
            "list/without_order": float((~ordered).sum()),
        }

    def _batch(self, data: Comparisons, index: Tensor) -> Batch:
        if self.needs_reference:
            data.know_reference(self.policy, index)
        return data.batch(index)

    def compared(self, batch: Batch) -> Compared:
        """The batch under the policy and, where the method has one, the reference."""
        if not self.needs_reference:
            batch = batch.with_fields(reference=torch.zeros_like(batch.reference))
        return compared(self.policy, batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        found = self.compared(batch)
        value = self.losses(found).sum() / batch.items
        with torch.no_grad():
            terms = {f"loss/{name}": float(t.mean()) for name, t in self.terms(found).items()}
        return value, {**terms, **comparison_metrics(self.implicit_rewards(found), found)}

    def evaluate(self) -> Metrics:
        """Accuracy, margin and loss on held-out data; reward and KL if a reward is given."""
        metrics: Metrics = {}
        if self.held_out is not None:
            batch = self._batch(self.held_out, torch.arange(len(self.held_out)))
            totals: list[Tensor] = []
            for part in batch.split(SCORING_TOKENS):
                found = self.compared(part)
                rewards = self.implicit_rewards(found).float().cpu()
                right = accuracy(rewards, part.scores, part.present)
                margin = (rewards[:, 0] - last(rewards, part.present)).mean()
                loss = self.losses(found).float().mean()
                totals.append(len(part) * torch.tensor([right, float(margin), float(loss)]))
            means = (torch.stack(totals).sum(0) / len(batch)).tolist()
            metrics = dict(zip(("accuracy", "margin", "loss"), means, strict=True))
        if self.frontier is not None:
            metrics |= self.frontier.measure(self.policy)
        return metrics

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        part = batch.select(torch.arange(min(len(batch), 4)))
        with torch.no_grad():
            found = self.compared(part)
            rewards = self.implicit_rewards(found).float().cpu()
        margins = rewards[:, 0] - last(rewards, part.present)
        rows = []
        for i, responses in enumerate(part.responses):
            names = ["chosen", "rejected"]
            if self.data.examples.format == "rankings":
                names = [f"response {place}" for place in range(1, len(responses) + 1)]
            texts = [self.policy.decode(response) for response in responses]
            rows.append(
                {
                    "prompt": self.policy.decode(part.prompts[i]),
                    **dict(zip(names, texts, strict=True)),
                    "margin": float(margins[i]),
                }
            )
        return rows

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.examples.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.data.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.reference.copy_(state["reference"])

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
