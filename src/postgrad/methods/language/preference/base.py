"""Pairwise preference methods: one blank, the loss of a margin of log-ratios."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import Given, LanguageSettings, find_materials, render_prompts
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.pairwise import margin, sequence_logprobs
from postgrad.tasks import Examples
from postgrad.timing import timed

SCORING_TOKENS = 16384  # in one forward pass without gradients


class PairwiseSettings(LanguageSettings):
    """Settings of the pairwise preference methods."""

    data: DataSettings = setting(DataSettings(name="docstrings"), "preference pairs")
    batch_size: int = setting(16, "pairs a step", gt=0)
    beta: float = setting(0.1, "strength of the KL to the reference", gt=0, source="DPO paper")
    max_response_tokens: int = setting(256, "longer responses are cut", gt=0)


class Pairs:
    """Tokenised preference pairs, with the reference's log-probabilities once they are known."""

    def __init__(self, policy: LanguagePolicy, examples: Examples, config: PairwiseSettings):
        limit = config.max_response_tokens
        self.examples = examples
        self.prompts = render_prompts(policy, examples, config, reserve=limit)
        self.chosen = [policy.encode_response(row["chosen"])[:limit] for row in examples.rows]
        self.rejected = [policy.encode_response(row["rejected"])[:limit] for row in examples.rows]
        for number, (won, lost) in enumerate(zip(self.chosen, self.rejected, strict=True)):
            if won.equal(lost):
                raise PostgradError(
                    f"{examples.where(number)}: chosen and rejected are the same after "
                    f"tokenisation (max_response_tokens={limit})"
                )
        self.reference = torch.full((len(examples), 2), torch.nan)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, index: Tensor) -> Batch:
        rows = index.tolist()
        prompts = [self.prompts[i] for i in rows]
        chosen, rejected = [self.chosen[i] for i in rows], [self.rejected[i] for i in rows]
        lengths = [
            len(p) + len(w) + len(l) for p, w, l in zip(prompts, chosen, rejected, strict=True)
        ]
        return Batch(
            index=index,
            prompts=prompts,
            chosen=chosen,
            rejected=rejected,
            reference=self.reference[index],
            cost=torch.tensor(lengths),
        )


def accuracy(delta: Tensor) -> float:
    """The share of margins `[B]` above 0. One of exactly 0, as at the reference, counts half."""
    return float((0.5 * (delta.sign() + 1)).mean())


class PairwisePreference(Method):
    """Learns from pairs; a subclass fills `pair_loss`, a function of the margin.

    The reference is the frozen initial policy (with LoRA: the adapter switched off). Its
    log-probabilities are computed when a pair is first seen and kept, also in checkpoints.
    """

    recipe = {
        "precision": "auto",
        "learning_rate": 1e-6,
        "clip_norm": 10.0,
        "warmup_steps": 10,
        "steps": 100,
    }
    config: PairwiseSettings

    def __init__(self, config: PairwiseSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place)
        found = find_materials(config, place, "preferences", given)
        self.policy, self.order = found.policy, found.order
        self.policy.freeze_reference()
        self.pairs = Pairs(self.policy, found.data, config)
        self.held_out = Pairs(self.policy, found.held_out, config) if found.held_out else None

    @abstractmethod
    def pair_loss(self, delta: Tensor) -> Tensor:
        """The loss `[B]` of the margins Delta `[B]` (see `objectives.pairwise.margin`)."""

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step)
        self._know_reference(self.pairs, index)
        return self.pairs.batch(index)

    def _know_reference(self, pairs: Pairs, index: Tensor) -> None:
        unknown = index[pairs.reference[index].isnan().any(1)]
        if len(unknown):
            with timed("scoring"), torch.no_grad(), self.policy.reference():
                for part in pairs.batch(unknown).split(SCORING_TOKENS):
                    known = torch.stack(self._logprobs(part), dim=1)
                    pairs.reference[part.index] = known.float().cpu()

    def _logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sequence log-probabilities `[B]` of the chosen and of the rejected responses."""
        scores = self.policy.score(batch.prompts * 2, batch.chosen + batch.rejected)
        won, lost = sequence_logprobs(scores.logprobs, scores.mask).chunk(2)
        return won, lost

    def _margins(self, batch: Batch) -> Tensor:
        """Delta `[B]`, on the CPU."""
        won, lost = self._logprobs(batch)
        return margin(won.cpu(), lost.cpu(), *batch.reference.unbind(1))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        won, lost = self._logprobs(batch)
        reference_won, reference_lost = batch.reference.to(won.device).unbind(1)
        delta = margin(won, lost, reference_won, reference_lost)
        value = self.pair_loss(delta).sum() / batch.items
        likely = torch.stack([won, lost]).detach()
        rewards = self.config.beta * (likely - torch.stack([reference_won, reference_lost]))
        return value, {
            "rewards/chosen": float(rewards[0].mean()),
            "rewards/rejected": float(rewards[1].mean()),
            "rewards/margin": float((rewards[0] - rewards[1]).mean()),
            "rewards/accuracy": accuracy(delta.detach()),
            "logprobs/chosen": float(likely[0].mean()),
            "logprobs/rejected": float(likely[1].mean()),
        }

    def evaluate(self) -> Metrics:
        """Accuracy, margin and loss of the implicit reward on held-out pairs."""
        if self.held_out is None:
            return {}
        pairs = self.held_out
        self._know_reference(pairs, torch.arange(len(pairs)))
        deltas = []
        for part in pairs.batch(torch.arange(len(pairs))).split(SCORING_TOKENS):
            deltas.append(self._margins(part))
        delta = torch.cat(deltas).float()
        return {
            "accuracy": accuracy(delta),
            "margin": float(self.config.beta * delta.mean()),
            "loss": float(self.pair_loss(delta).mean()),
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        part = batch.select(torch.arange(min(len(batch), 4)))
        with torch.no_grad():
            deltas = self._margins(part)
        return [
            {
                "prompt": self.policy.decode(part.prompts[i]),
                "chosen": self.policy.decode(part.chosen[i]),
                "rejected": self.policy.decode(part.rejected[i]),
                "margin": float(self.config.beta * deltas[i]),
            }
            for i in range(len(part))
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.pairs.examples.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.pairs.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs.reference.copy_(state["reference"])

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
