"""Kahneman-Tversky Optimization."""

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.language.base import Given, find_materials
from postgrad.methods.language.comparisons import (
    SCORING_TOKENS,
    compared,
    comparison_batch,
    known_logprobs,
)
from postgrad.methods.language.frontier import Frontier
from postgrad.methods.language.preference.base import Comparisons, PreferenceSettings
from postgrad.objectives.unpaired import kto, mismatched_kl
from postgrad.sampling.epochs import Epochs


class KTOSettings(PreferenceSettings):
    """KTO's settings."""

    batch_size: int = setting(16, "labelled responses a step; at least 2", ge=2)
    desirable_weight: float = setting(
        1.0,
        "lambda_D; the paper keeps the ratio of weight times count, desirable to undesirable, "
        "within 1 to 4/3",
        ge=0,
        source="KTO paper",
    )
    undesirable_weight: float = setting(1.0, "lambda_U", ge=0, source="KTO paper")


class KTO(Method):
    """Kahneman-Tversky Optimization (Ethayarajh et al. 2024, arXiv:2402.01306).

    Learns from single responses with a thumb up or down: no pairs. People weigh gains and losses
    against a reference point, which here is the policy's KL to the reference policy.

        r = log pi(y|x)/pi_ref(y|x),   z = max(0, mean of log pi(y'|x)/pi_ref(y'|x))
        L = lambda_D [1 - sigma(beta (r - z))]   of a desirable y
        L = lambda_U [1 - sigma(beta (z - r))]   of an undesirable y

    In z each prompt has the response y' of its neighbour in the batch, and no gradient flows. Equal
    to TRL's `kto`; TRL makes the mismatched pairs once for the whole data set, this in every batch
    anew, of the batch's own responses. Preferences serve as two labelled responses each.
    """

    Config = KTOSettings
    recipe = {
        "precision": "auto",
        "learning_rate": 1e-6,
        "clip_norm": 10.0,
        "warmup_steps": 10,
        "steps": 100,
    }
    config: KTOSettings

    def __init__(self, config: KTOSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place)
        found = find_materials(config, place, "labelled", given)
        self.policy, self.order = found.policy, found.order
        if self.order.size < 2:
            raise PostgradError(
                f"{found.data.name}: the KL needs at least 2 labelled responses a step, got 1"
            )
        self.data = Comparisons(self.policy, found.data, config)
        self.held_out = Comparisons(self.policy, found.held_out, config) if found.held_out else None
        self.policy.freeze_reference()
        self.frontier = Frontier.of(config, config.frontier, found, place)

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def collect(self, step: int) -> Batch:
        return self._batch(self.data, self.order.indices(step))

    def _batch(self, data: Comparisons, index: Tensor) -> Batch:
        data.know_reference(self.policy, index)
        batch = data.batch(index)
        desirable = torch.tensor([data.examples[i]["label"] for i in index.tolist()])
        kl = mismatched_kl(self._mismatched(batch))
        return batch.with_fields(desirable=desirable, kl=kl.expand(len(batch)))

    def _mismatched(self, batch: Batch) -> Tensor:
        """log pi/pi_ref `[N]` of every response after the prompt of the next one."""
        turned = comparison_batch(batch.prompts, [*batch.responses[-1:], *batch.responses[:-1]])
        now = known_logprobs(self.policy, turned)
        with self.policy.reference():
            return (now - known_logprobs(self.policy, turned)).squeeze(1)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and implicit reward `[N]` of each response."""
        found = compared(self.policy, batch)
        ratio = found.log_ratio.squeeze(1)
        weights = self.config.desirable_weight, self.config.undesirable_weight
        desirable, kl = batch.desirable.to(ratio.device), batch.kl.to(ratio.device)
        losses = kto(ratio, desirable, kl, self.config.beta, *weights)
        return losses, self.config.beta * ratio.detach()

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        losses, rewards = self._losses(batch)
        # not one mean a label: a micro-batch may hold one label alone
        sign = torch.where(batch.desirable, 1.0, -1.0).to(rewards)
        return losses.sum() / batch.items, {"rewards/signed": float((sign * rewards).mean())}

    def describe_batch(self, batch: Batch) -> Metrics:
        return {
            "kl/mismatched": float(batch.kl[0]),
            "desirable": float(batch.desirable.float().mean()),
        }

    def evaluate(self) -> Metrics:
        """Loss, and how well rewards tell the labels apart; reward and KL if a reward is given."""
        metrics: Metrics = {}
        if self.held_out is not None and len(self.held_out) > 1:
            # shuffled as in training, where neighbours are seldom of one prompt
            size = len(self.held_out)
            batch = self._batch(self.held_out, Epochs(size, size, seed=0).indices(0))
            parts = [self._losses(part) for part in batch.split(SCORING_TOKENS)]
            losses, rewards = (
                torch.cat(values).float().cpu() for values in zip(*parts, strict=True)
            )
            liked, disliked = rewards[batch.desirable], rewards[~batch.desirable]
            metrics["loss"] = float(losses.mean())
            if len(liked) and len(disliked):
                verdicts = 0.5 * ((liked[:, None] - disliked[None, :]).sign() + 1)
                metrics["accuracy"] = float(verdicts.mean())
                metrics["margin"] = float(liked.mean() - disliked.mean())
        if self.frontier is not None:
            metrics |= self.frontier.measure(self.policy)
        return metrics

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        part = batch.select(torch.arange(min(len(batch), 4)))
        with torch.no_grad():
            _, rewards = self._losses(part)
        return [
            {
                "prompt": self.policy.decode(part.prompts[i]),
                "response": self.policy.decode(part.responses[i][0]),
                "desirable": bool(part.desirable[i]),
                "reward": float(rewards[i]),
            }
            for i in range(len(part))
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.examples.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.data.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.reference.copy_(state["reference"])

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
