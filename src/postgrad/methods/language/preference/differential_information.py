"""DPO that learns low-entropy differential information, and how that entropy is measured."""

from collections.abc import Sequence

import torch
from pydantic import field_validator
from torch import Tensor

from postgrad import processes
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import Metrics, Optimise
from postgrad.methods.language.comparisons import (
    Compared,
    comparison_batch,
    comparison_metrics,
    known_logprobs,
)
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.gradients import with_gradient, without_lowering
from postgrad.objectives.information import sampled_did_entropy
from postgrad.objectives.pairwise import logistic, pair_weight
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.seeding import derive
from postgrad.timing import timed


class ProjectedDPOSettings(PreferenceSettings):
    """Settings of DPO with projected gradients."""

    information_samples: int = setting(
        0,
        "samples a held-out prompt for the entropy of the differential information, in every "
        "evaluation; 0: not measured, the paper takes 32",
        ge=0,
    )

    @field_validator("information_samples")
    @classmethod
    def _several(cls, value: int) -> int:
        if value == 1:
            raise ValueError("information_samples: an estimate needs at least 2 samples, got 1")
        return value


class ProjectedDPO(PreferenceMethod):
    """DPO-PG of Differential Information (Won et al. 2025, arXiv:2505.23761).

    What turns the reference into a policy has a distribution of its own, q ∝ pi/pi_ref. Where
    preferences encode it, DPO's log-ratio is the only reward whose optimum is the target policy.
    Learning q of high entropy smooths the policy, and the likelihood of chosen responses falls;
    q of low entropy reinforces it. DPO-PG is to learn the latter: it takes DPO's step without the
    part that lowers the chosen responses' likelihood,

        w   = beta sigma(-beta Delta)                                (of each pair, held constant)
        g_w = grad mean w log pi(y_w),   g_l = grad mean w log pi(y_l)
        d   = g_w - g_l                                              (DPO's ascent direction)
        d  <- d - min(0, <d, g_w>)/||g_w||^2 g_w

    Reconstruction: the paper's variant is known by its aim, and this projection is inferred from it
    (uncertain). Both gradients are sums over the whole batch, however it is cut; memory for two
    more gradients is needed. That the likelihood does not fall holds to first order and for a plain
    gradient step; AdamW's differs from that. `projection` is how much of g_w was added, the loss
    is DPO's. Beside it evaluations can estimate the entropy of q (`measure_information`).
    """

    Config = ProjectedDPOSettings
    config: ProjectedDPOSettings

    def whole_weights(self) -> str:
        return "takes two gradients apart"

    def losses(self, found: Compared) -> Tensor:
        return logistic(self.config.beta * found.delta)

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        chosen, rejected = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        seen, projection = 0, 0.0

        def loss(part: Batch) -> tuple[Tensor, Metrics]:
            """The part's loss; the last part's has the gradient of the whole step."""
            nonlocal seen, projection
            found = self.compared(part)
            value = self.losses(found).sum() / part.items
            weights = self.config.beta * pair_weight(self.config.beta * found.delta.detach())
            likely = (weights[:, None] * found.logprobs / part.items).sum(0)
            _add_gradients(likely[0], parameters, chosen, keep=True)
            _add_gradients(likely[1], parameters, rejected)
            seen += len(part)
            metrics = comparison_metrics(self.implicit_rewards(found), found)
            if seen < part.items:
                return value.detach().requires_grad_(), metrics
            ascent = [won - lost for won, lost in zip(chosen, rejected, strict=True)]
            ascent, projection = without_lowering(ascent, chosen)
            return with_gradient(value, parameters, [-d for d in ascent]), metrics

        with processes.apart():  # the step's direction is no sum of what parts have
            metrics = optimise(loss, batch)
        return {**metrics, "projection": projection}

    def evaluate(self) -> Metrics:
        metrics = super().evaluate()
        samples = self.config.information_samples
        if samples and self.held_out is not None:
            tokens = self.config.max_response_tokens
            metrics |= measure_information(
                self.policy, self.held_out.prompts, samples, tokens, self.place.seed
            )
        return metrics


def _add_gradients(
    value: Tensor, parameters: Sequence[Tensor], totals: Sequence[Tensor], keep: bool = False
) -> None:
    """Add the gradient of `value` to `totals`; `keep` if the graph is needed once more."""
    with timed("backward"), torch.autocast(value.device.type, enabled=False):
        found = torch.autograd.grad(value, parameters, retain_graph=keep, allow_unused=True)
        for total, gradient in zip(totals, found, strict=True):
            if gradient is not None:
                total += gradient


@torch.no_grad()
def measure_information(
    policy: LanguagePolicy, prompts: Sequence[Tensor], samples: int, max_new_tokens: int, seed: int
) -> Metrics:
    """Entropies from fresh samples of the policy, means over the prompts, in nats.

    `information/entropy` is that of the differential information from the reference, with its
    standard error and number of effective samples (see `sampled_did_entropy`: at sequences these
    are few, and the estimate is rough); `entropy` is the policy's own.
    """
    seeds = [derive(seed, "information", i) for i in range(len(prompts) * samples)]
    sampling = SamplingSettings(max_new_tokens)
    drawn = generate(policy, list(prompts), sampling, samples=samples, seeds=seeds).responses
    rows = [drawn[i : i + samples] for i in range(0, len(drawn), samples)]
    batch = comparison_batch(prompts, rows)
    now = known_logprobs(policy, batch)
    with policy.reference():
        before = known_logprobs(policy, batch)
    found = sampled_did_entropy(now, before)
    return {
        "information/entropy": float(found.entropy.mean()),
        "information/error": float(found.error.square().mean().sqrt() / len(prompts) ** 0.5),
        "information/effective_samples": float(found.effective_samples.mean()),
        "entropy": float(-now.mean()),
    }
