"""One-Token Rollout."""

from typing import Literal

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import FourParts, Metrics
from postgrad.methods.language.supervised.sft import SFT, SFTSettings
from postgrad.objectives.one_token import expected_one_token_rollout, one_token_rollout
from postgrad.sampling.drawing import draw_several, uniform_stream
from postgrad.seeding import derive


class OTRSettings(SFTSettings):
    """One-Token Rollout's settings."""

    candidates: int = setting(256, "K, tokens drawn at every position", gt=0, source="paper")
    beta: float = setting(
        -0.1,
        "reward of every token but the demonstrated one",
        lt=1,
        source="slightly negative in the paper; the number is (uncertain)",
    )
    kappa: float = setting(
        1.3,
        "temperature that candidates are drawn at",
        gt=0,
        source="above 1 in the paper; the number is (uncertain)",
    )
    exact: bool = setting(False, "take the mean over all candidates in place of drawing some")
    aggregation: Literal["sequence-mean", "token-mean"] = setting(
        "sequence-mean", "how token losses become one", source="paper"
    )


class OTR(SFT):
    """One-Token Rollout (Ming, Wu, Hu, He, Yu 2025, arXiv:2509.26313).

    SFT learns from tokens that the policy may find unlikely, reinforcement learning from what it
    would say itself. Here every position of a demonstration is a one-step problem of reinforcement
    learning: K candidate tokens are drawn from the policy, and rewarded if they are the
    demonstrated one. The next position's context is the demonstration again, so that one forward
    pass does for all, and there is neither verifier nor reference.

        a_k ~ pi'(. | s_t) = softmax(logits / kappa),   R(a) = 1 if a = x_t else beta
        L = - mean_i (1/T_i) sum_t (1/K) sum_k R(a_k) log pi(a_k | s_t)

    log pi is at temperature 1; draws and rewards are constants, without baseline or clip. A token
    that the policy would not say is hardly learnt: SFT's gradient is multiplied by pi'(x_t), so
    that a format which is new to the policy should be taught by SFT first. With kappa > 1 and
    beta < 0 the misses sharpen the policy; -log pi of a miss has no lower bound, but its gradient
    on the logits is at most |beta|.

    `exact` takes the expectation over candidates. With kappa=1 and beta=0 as well, and
    aggregation=token-mean, it is dynamic fine-tuning (DFT, Wu et al. 2025, arXiv:2508.05629):
    L = - sum_t pi(x_t) log pi(x_t) / number of tokens, the weight constant. At kappa = 1 any beta
    has (1 - beta) times its gradient.

    A demonstration's draws are a function of seed, step and its place in the step. No official code
    is known; beta, kappa, learning rate and batch size of the paper could not be checked
    (uncertain).
    """

    Config = OTRSettings
    parts = FourParts(
        mask="none",
        denominator="none: every draw is the present policy's, at temperature kappa",
        advantage="1 for the demonstrated token, beta for any other",
        gradient="token log-likelihood",
    )
    config: OTRSettings

    def collect(self, step: int) -> Batch:
        batch = super().collect(step)
        seeds = [derive(self.place.seed, "candidates", step, i) for i in range(len(batch))]
        return batch.with_fields(seeds=torch.tensor(seeds))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        config = self.config
        targets = torch.cat(batch.responses).to(self.policy.device)
        uniforms = None if config.exact else self._uniforms(batch)
        likely: dict[int, Tensor] = {}  # by a part's first token: the backward pass asks again
        drawn: dict[int, Tensor] = {}

        def losses(logits: Tensor, rows: slice) -> Tensor:
            x, part = targets[rows], rows.start
            if part not in likely:
                likely[part] = _logprobs(logits.detach(), x)
            if uniforms is None:
                return expected_one_token_rollout(logits, x, config.beta, config.kappa)
            if part not in drawn:
                drawn[part] = draw_several(logits.detach(), uniforms[rows], config.kappa)
            return one_token_rollout(logits, x, drawn[part], config.beta)

        per_token = self.policy.of_logits(batch.prompts, batch.responses, losses)
        known = torch.cat(list(likely.values()))
        metrics = {
            "likelihood/loss": -float(known.mean()),  # SFT's
            "likelihood/target": float(known.exp().mean()),
        }
        if drawn:
            hits = torch.cat(list(drawn.values())) == targets[:, None]
            metrics["candidates/hits"] = float(hits.float().mean())
            metrics["candidates/none"] = float((~hits.any(-1)).float().mean())
        if config.aggregation == "token-mean":
            return per_token.sum() / batch.tokens, metrics
        lengths = batch.lengths.to(per_token.device)
        return (per_token.sum(1) / lengths).sum() / batch.items, metrics

    def _uniforms(self, batch: Batch) -> Tensor:
        """The numbers `[tokens, K]` that decide the draws, each demonstration's from its seed."""
        count = self.config.candidates
        streams = [
            uniform_stream(seed, length * count).view(length, count)
            for seed, length in zip(batch.seeds.tolist(), batch.lengths.tolist(), strict=True)
        ]
        return torch.cat(streams).to(self.policy.device)


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
