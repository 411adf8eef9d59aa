"""Hybrid Preference Optimization."""

from typing import Literal, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import Given, RolloutSettings, draw_responses, pad
from postgrad.methods.language.comparisons import SCORING_TOKENS, Compared, token_scores
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.divergence import reverse_kl_surrogate
from postgrad.objectives.pairwise import logistic
from postgrad.timing import timed


class HyPOSettings(PreferenceSettings):
    """HyPO's settings."""

    beta: float = setting(
        0.05, "strength of the KL in the loss of the pairs", gt=0, source="paper (uncertain)"
    )
    kl_weight: float = setting(
        1e-4,
        "lambda, the weight of the reverse KL in nats a response; 0: DPO, and nothing is sampled. "
        "What is right depends on the length of responses: sweep it",
        ge=0,
        source="paper (uncertain)",
    )
    estimator: Literal["rloo", "reinforce", "token"] = setting(
        "rloo",
        "gradient of the KL: against the other samples' mean, plain, or each token's share",
        source="paper; token: the same expectation",
    )
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=2),
        "the fresh samples to each pair's prompt",
        source="paper: 2 samples (uncertain)",
    )


class HyPO(PreferenceMethod):
    """Hybrid Preference Optimization (Song, Swamy, Singh, Bagnell, Sun 2024, arXiv:2406.01462).

    An offline loss sees the data's responses alone: probability that the policy puts elsewhere is
    free, so DPO's reverse KL may grow without bound unless the data cover all responses. HyPO adds
    that KL, measured on k fresh samples of the policy; these need neither labels nor a reward.

        h = beta Delta of an offline pair;   y_i ~ pi(.|x),  c_i = log pi(y_i)/pi_ref(y_i)
        A_i = c_i - mean of the other c      (constant)
        L = mean -log sigma(h) + lambda mean_i A_i log pi(y_i)

    The second gradient is that of KL(pi || pi_ref). `estimator=token` gives each token the
    log-ratios from it on in place of A. Samples are cut at `rollout.max_new_tokens`, and the KL is
    that of responses so cut. Two other methods are also called HyPO; this is the one by coverage.
    The defaults of beta, lambda, k and the learning rate are quoted from the paper (uncertain); its
    batch of 512 pairs is not the default. No official code was read.
    """

    Config = HyPOSettings
    recipe = {**PreferenceMethod.recipe, "learning_rate": 3e-6}
    config: HyPOSettings

    def __init__(self, config: HyPOSettings, place: Place, **given: Unpack[Given]):
        config.rollout.require_unaltered("the KL")
        if config.estimator == "rloo" and config.rollout.samples < 2:
            raise PostgradError(
                "rollout.samples: estimator=rloo needs at least 2 samples a prompt, got "
                f"{config.rollout.samples}; reinforce and token do with 1"
            )
        super().__init__(config, place, **given)

    def losses(self, found: Compared) -> Tensor:
        return logistic(self.config.beta * found.delta)

    def collect(self, step: int) -> Batch:
        batch = super().collect(step)
        return self._with_own_samples(batch, step) if self.config.kl_weight > 0 else batch

    def _with_own_samples(self, batch: Batch, step: int) -> Batch:
        """The batch with k fresh samples to each prompt and what the reference says of them."""
        rollout, size = self.config.rollout, self.config.rollout.samples
        drawn = draw_responses(
            self.policy, batch.prompts, rollout, self.place.seed, "rollout", step
        )
        own = [drawn.responses[i : i + size] for i in range(0, len(drawn.responses), size)]
        tokens = torch.tensor(
            [
                len(prompt) + sum(map(len, several))
                for prompt, several in zip(batch.prompts, own, strict=True)
            ]
        )
        batch = batch.with_fields(
            own=own, finished=drawn.finished.view(-1, size), cost=batch.cost + tokens
        )
        known: list[Tensor] = []
        with timed("scoring"), self.policy.reference():
            for part in batch.split(SCORING_TOKENS):
                scores = token_scores(self.policy, part.prompts, part.own)
                logprobs = scores.logprobs.float().cpu()
                known += [row[:n] for row, n in zip(logprobs, scores.mask.sum(1), strict=True)]
        return batch.with_fields(
            own_reference=[known[i : i + size] for i in range(0, len(known), size)]
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = super().loss(batch)
        if "own" not in batch:
            return value, metrics
        scores = token_scores(self.policy, batch.prompts, batch.own)
        reference = pad([row for several in batch.own_reference for row in several])
        shape = (len(batch), self.config.rollout.samples, -1)
        logprobs, reference = scores.logprobs.view(shape), reference.to(scores.logprobs).view(shape)
        surrogate = reverse_kl_surrogate(
            logprobs, reference, scores.mask.view(shape), self.config.estimator
        )
        metrics |= {
            "loss/pairs": float(value.detach()) * batch.items / len(batch),
            "kl/own_samples": float((logprobs.detach() - reference).sum(2).mean()),
        }
        return value + self.config.kl_weight * surrogate.sum() / batch.items, metrics

    def describe_batch(self, batch: Batch) -> Metrics:
        if "own" not in batch:
            return {}
        lengths = [len(response) for several in batch.own for response in several]
        return {
            "response/length": sum(lengths) / len(lengths),
            "response/truncated": float((~batch.finished).float().mean()),
        }
