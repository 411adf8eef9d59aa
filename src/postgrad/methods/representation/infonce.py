"""InfoNCE: contrastive fine-tuning of a causal language model as a text encoder."""

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.evaluation.retrieval import retrieval_metrics
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.language.base import Given, LanguageSettings, find_materials
from postgrad.methods.representation.text import INSTRUCTION, TextEncoder
from postgrad.objectives.contrastive import info_nce


class InfoNCESettings(LanguageSettings):
    temperature: float = setting(
        0.05, "divides the similarities", source="arXiv:2104.08821 (SimCSE)", gt=0
    )
    hard_negatives: bool = setting(
        True, "use the data's negatives beside those in the batch; off: pairs suffice"
    )
    instruction: str = setting(INSTRUCTION, "system message before every text", min_length=1)
    max_text_tokens: int = setting(128, "longer texts are cut", gt=0)


class InfoNCE(Method):
    """Contrastive Predictive Coding's loss (arXiv:1807.03748) on a causal language model.

    The positive d+ of an anchor text q must be told from the positives and hard negatives d- of the
    whole batch, by the similarity of their embeddings:

        loss_i = -log( exp(sim(q_i, d_i+) / tau) / Z_i ),
        Z_i = sum_j exp(sim(q_i, d_j+) / tau) + exp(sim(q_i, d_j-) / tau).

    An embedding is the mean last hidden state over a text, without a rationale, as `TextEncoder`
    renders it; attention stays causal. This is the contrastive baseline of GRACE
    (arXiv:2510.04506); its temperature there is not known to us, so SimCSE's is the default. The
    batch of a step is one forward pass: its items are each other's negatives, so gradients cannot
    accumulate over parts of it.
    """

    Config = InfoNCESettings
    recipe = {"steps": 100, "learning_rate": 2e-5, "schedule": "linear", "warmup_steps": 5}
    config: InfoNCESettings

    def __init__(self, config: InfoNCESettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place)
        if config.batch_size < 2 and not config.hard_negatives:
            raise PostgradError("batch_size: a batch of 1 has no negatives, expected at least 2")
        formats = "triples" if config.hard_negatives else "pairs"
        found = find_materials(config, place, formats, given, held_out_formats="pairs")
        self.policy, self.data, self.held_out = found.policy, found.data, found.held_out
        self.order = found.order
        self.encoder = TextEncoder(
            self.policy, instruction=config.instruction, max_text_tokens=config.max_text_tokens
        )

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def collect(self, step: int) -> Batch:
        rows = [self.data.rows[i] for i in self.order.indices(step).tolist()]
        batch = Batch(
            anchor=[row["anchor"] for row in rows], positive=[row["positive"] for row in rows]
        )
        if self.config.hard_negatives:
            batch = batch.with_fields(negative=[row["negative"] for row in rows])
        return batch

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        texts = batch.anchor + batch.positive
        if self.config.hard_negatives:
            texts = texts + batch.negative
        anchors, positives, *negatives = self.encoder.embed(texts).split(len(batch))
        # similarities are divided by a small temperature: half precision would show
        with torch.autocast(anchors.device.type, enabled=False):
            loss = info_nce(
                anchors,
                positives,
                negatives[0].unsqueeze(1) if negatives else None,
                temperature=self.config.temperature,
            )
        similarity = torch.cosine_similarity(anchors.detach(), positives.detach()).mean()
        return loss.sum() / batch.items, {"similarity": float(similarity)}

    def evaluate(self) -> Metrics:
        """Retrieval of each held-out anchor's positive among the first `eval_size` positives."""
        if self.held_out is None:
            return {}
        rows = self.held_out.rows
        sides = ([row[side] for row in rows] for side in ("anchor", "positive"))
        return retrieval_metrics(*map(self.embed, sides))

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings `[N, d]` of texts."""
        return self.encoder.embed_all(texts)

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [
            {"prompt": anchor, "response": positive}
            for anchor, positive in zip(batch.anchor[:4], batch.positive[:4], strict=True)
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def save(self, folder: Path) -> None:
        self.encoder.save(folder)
