"""Generative Representation Learning via Contrastive Policy Optimization."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.evaluation.retrieval import retrieval_metrics
from postgrad.methods.base import Metrics, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import Given, RolloutSettings
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.policy_gradient import PolicyGradientSettings, SampledPolicyGradient
from postgrad.methods.language.rollouts import rollout_batch
from postgrad.methods.representation.text import INSTRUCTION, TextEncoder, parts_of
from postgrad.rewards.contrastive import (
    contrastive_rationale_reward,
    unsupervised_rationale_reward,
)
from postgrad.sampling.generation import Rollouts
from postgrad.timing import timed


class GraceSettings(PolicyGradientSettings):
    """GRACE's settings."""

    data: DataSettings = setting(
        DataSettings(name="docstrings"), "pairs; triples with negative_weight; texts unsupervised"
    )
    advantage: AdvantageChoice = setting(
        "centred",
        "from rewards to advantages: a rationale against the text's others",
        source="paper",
    )
    mode: Literal["supervised", "unsupervised"] = setting(
        "supervised", "pairs of a query and its text, or raw texts that are their own queries"
    )
    instruction: str = setting(INSTRUCTION, "asks for the rationale, before every text")
    max_text_tokens: int = setting(72, "longer texts are cut (code: 1024)", gt=0)
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=8, max_new_tokens=24, temperature=0.7),
        "K rationales a text (code: 2048 tokens at temperature 1)",
        source="K: train.sh, temperature: measured",
    )
    partner_temperature: float = setting(
        0.5, "sampling temperature of the query's and the negative's rationale",
        gt=0, source="official code",
    )  # fmt: skip
    negatives: Literal["per_rollout", "paper"] = setting(
        "per_rollout",
        "paper: negatives are the same for all rollouts of a text, so they cancel in its advantage",
        source="variant of this library",
    )
    negative_weight: float = setting(
        0.0, "weight of R_neg, the given negative (paper: 1)", ge=0, source="measured"
    )
    consistency: float = setting(0.2, "weight lambda1 of R_cons", ge=0, source="train.sh")
    hard_negatives: float = setting(
        1.0, "weight lambda2 of R_hard (train.sh: 0.2)", ge=0, source="measured, see the claim"
    )
    reward_temperature: float = setting(0.1, "tau, divides the reward", gt=0, source="train.sh")
    truncation_reward: float | None = setting(
        None, "replaces the reward of a rationale that was cut (code: -1); empty: no such rule"
    )


class Grace(SampledPolicyGradient):
    """GRACE (Sun et al. 2025, arXiv:2510.04506): contrastive learning through written rationales.

    The model first writes a rationale y of a text x; the embedding e(x, y) is the mean of the last
    hidden states over text and rationale. The contrastive signal is a reward for the rationale, not
    a gradient through the embedding, so the model stays a language model whose judgements of
    similarity can be read. For rationale k of the positive text of triple i

        R = (sim(q_i, d_ik) + w R_neg + lambda1 R_cons + lambda2 R_hard) / tau,   A = R - mean_k R
        L = - mean over tokens of A log pi(y)             (clipped ratio with several updates)

    With `negatives=paper`, R_neg and R_hard do not depend on k and cancel in A: the published
    objective is attraction and consistency alone. `per_rollout`, the default here, measures both
    terms from each rollout, as the authors' code does in the unsupervised mode. Other defaults
    that differ from the authors' were measured on a part of the training data: the given negative,
    a text of the same kind as the positive, made the rationales drift, so its weight w is 0 (pairs
    suffice then); at a temperature of 1 a small model first learns what being less random would
    have given it, while evaluation writes greedily, so rationales are sampled at 0.7; the rule that
    gives truncated rationales a reward of -1 is off, since short rationales are always cut. Without
    warm-up AdamW's first steps, as long as all others, sometimes make the rationales collapse.
    """

    Config = GraceSettings
    recipe = {"learning_rate": 1e-4, "warmup_steps": 4, "steps": 20, "precision": "bf16"}
    config: GraceSettings

    def __init__(self, config: GraceSettings, place: Place, **given: Unpack[Given]):
        if config.rollout.samples < 2:
            raise PostgradError(
                "rollout.samples: the advantage compares the rationales of a text, so GRACE needs "
                f"at least 2, got {config.rollout.samples}"
            )
        if config.batch_size < 2 and config.hard_negatives > 0:
            raise PostgradError(
                "batch_size: the hard-negative reward compares texts of a batch, so it needs at "
                f"least 2, got {config.batch_size} (or set hard_negatives=0)"
            )
        formats = "triples" if config.negative_weight > 0 else "pairs"
        if config.mode == "unsupervised":
            formats = "text"
        super().__init__(config, place, formats, given, held_out_formats="pairs")
        self.encoder = TextEncoder(
            self.policy, instruction=config.instruction, max_text_tokens=config.max_text_tokens
        )
        self.first_rationales: list[str] = []
        self.last_rationales: list[str] = []

    def collect(self, step: int) -> Batch:
        rows = [self.data.rows[i] for i in self.order.indices(step).tolist()]
        if self.config.mode == "unsupervised":
            texts = [row["text"] for row in rows]
            partners = [texts]
        else:
            texts = [row["positive"] for row in rows]
            partners = [[row["anchor"] for row in rows]]
            if self.config.negative_weight > 0:
                partners.append([row["negative"] for row in rows])
        rollouts = self._write(
            texts, step, "text", self.config.rollout.samples, self.config.rollout.temperature
        )
        others = [
            self._write(side, step, f"partner {n}", 1, self.config.partner_temperature)
            for n, side in enumerate(partners)
        ]
        with timed("reward"), torch.no_grad():
            own = self._embed(rollouts).unflatten(0, (len(rows), -1))
            reward, terms = self._reward(own, [self._embed(other) for other in others], rollouts)
        group = torch.arange(len(rows)).repeat_interleave(self.config.rollout.samples)
        flat = {name: term.flatten() for name, term in terms.items()}
        return self.learnable(
            rollout_batch(rollouts, step, group=group, reward=reward.flatten(), terms=flat)
        )

    def _reward(
        self, own: Tensor, others: list[Tensor], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        common: dict[str, Any] = {
            "consistency": config.consistency,
            "temperature": config.reward_temperature,
        }
        if config.truncation_reward is not None:
            cut = ~rollouts.finished.view(own.shape[:2])
            common |= {"truncated": cut, "truncation_reward": config.truncation_reward}
        if config.mode == "unsupervised":
            return unsupervised_rationale_reward(
                others[0], own, cross=config.hard_negatives, **common
            )
        return contrastive_rationale_reward(
            others[0],
            own,
            others[1] if len(others) > 1 else None,
            negative_weight=config.negative_weight,
            hard_negatives=config.hard_negatives,
            negatives=config.negatives,
            **common,
        )

    def _write(
        self, texts: Sequence[str], step: int, who: str, samples: int, temperature: float
    ) -> Rollouts:
        """Rationales of `texts`, `samples` of each."""
        prompts = [self.encoder.render(text) for text in texts]
        return self.roll_out(
            prompts, "rationale", who, step, samples=samples, temperature=temperature
        )

    def _embed(self, rollouts: Rollouts) -> Tensor:
        skip = self.encoder.prefix_length
        return self.policy.embed(rollouts.prompts, rollouts.responses, skip=skip).float().cpu()

    def embed(self, texts: list[str], *, rationale: bool = True) -> Tensor:
        """Embeddings `[N, d]` of texts, with a greedily written rationale or without one."""
        if not rationale:
            return self.encoder.embed_all(texts)
        with torch.no_grad():
            written = (self._write(part, 0, "inference", 1, 0.0) for part in parts_of(texts))
            return torch.cat([self._embed(rationales) for rationales in written])

    def evaluate(self) -> Metrics:
        """Retrieval of the positive among all held-out positives, with greedy rationales."""
        if self.held_out is None:
            return {}
        queries = [row["anchor"] for row in self.held_out.rows]
        documents = [row["positive"] for row in self.held_out.rows]
        written = self._write(queries + documents, 0, "evaluation", 1, 0.0)
        self.last_rationales = written.texts
        metrics = retrieval_metrics(*self._embed(written).chunk(2))
        if not self.first_rationales:
            self.first_rationales = written.texts
            plain = self.embed(queries + documents, rationale=False)
            without = retrieval_metrics(*plain.chunk(2))
            metrics |= {f"without_rationale/{name}": value for name, value in without.items()}
        return metrics

    def evaluation_samples(self) -> list[dict[str, Any]]:
        if self.held_out is None:
            return []
        rows = self.held_out.rows
        return [
            {
                "text": row[side],
                "rationale_before": self.first_rationales[n],
                "rationale_after": self.last_rationales[n],
            }
            for side, offset in (("anchor", 0), ("positive", len(rows)))
            for n, row in zip(range(offset, offset + 8), rows, strict=False)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "first_rationales": self.first_rationales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.first_rationales = list(state["first_rationales"])

    def save(self, folder: Path) -> None:
        self.encoder.save(folder)
