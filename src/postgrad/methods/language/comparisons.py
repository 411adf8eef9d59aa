"""Several responses to each of many prompts, and what policy and reference say about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics
from postgrad.models.language import LanguagePolicy
from postgrad.models.scoring import TokenScores
from postgrad.models.text_network import TextNetwork
from postgrad.objectives.pairwise import margin, sequence_logprobs
from postgrad.timing import timed

SCORING_TOKENS = 16384  # in one forward pass without gradients


@dataclass(frozen=True)
class Compared:
    """What is known about K responses to each of B prompts, the best response first.

    Attributes:
        logprobs: `[B, K]` log pi(y|x), sums over a response's tokens; 0 where none is present.
        reference: `[B, K]` the reference's; 0 for methods without one.
        lengths: `[B, K]` response tokens.
        scores: `[B, K]` what the data say a response is worth (higher is better); NaN if nothing.
        present: `[B, K]` bool: lists may be of different lengths.
        others: more log-probabilities `[B, K]` by name, such as those of the policy that sampled.
    """

    logprobs: Tensor
    reference: Tensor
    lengths: Tensor
    scores: Tensor
    present: Tensor
    others: dict[str, Tensor]

    @property
    def log_ratio(self) -> Tensor:
        """log pi/pi_ref `[B, K]`."""
        return self.logprobs - self.reference

    @property
    def mean_logprobs(self) -> Tensor:
        """log pi(y|x)/|y| `[B, K]`."""
        return self.logprobs / self.lengths.clamp(min=1)

    @property
    def has_order(self) -> Tensor:
        """`[B]` bool: whether any response of a list is better than another."""
        return better(self.scores, self.present).any(-1).any(-1)

    @property
    def delta(self) -> Tensor:
        """Of pairs: the margin Delta `[B]` of log-ratios (see `objectives.pairwise.margin`)."""
        return margin(
            self.logprobs[:, 0], self.logprobs[:, 1], self.reference[:, 0], self.reference[:, 1]
        )


def comparison_batch(
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[Tensor]],
    scores: Tensor | None = None,
    **fields: Any,
) -> Batch:
    """Prompts `[P]` and their responses `[L]`, best first, as a batch of one item a prompt.

    `scores` `[B, K]` are NaN where not given; `fields` are further fields of the batch.
    """
    width = max(map(len, responses))
    lengths = torch.zeros(len(prompts), width, dtype=torch.long)
    present = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, several in enumerate(responses):
        lengths[row, : len(several)] = torch.tensor([len(response) for response in several])
        present[row, : len(several)] = True
    if scores is None:
        scores = torch.full((len(prompts), width), torch.nan)
    own = torch.tensor([len(prompt) for prompt in prompts])
    return Batch(
        prompts=list(prompts),
        responses=[list(several) for several in responses],
        lengths=lengths,
        present=present,
        scores=scores,
        cost=own + lengths.sum(1),
        **fields,
    )


def encoded_responses(
    model: TextNetwork, texts: Sequence[str], limit: int, limited_by: str, where: str
) -> list[Tensor]:
    """Token ids `[L]` of the responses to a prompt, at most `limit` of each.

    Raises:
        PostgradError: all are the same; names the row and the setting that limits them.
    """
    responses = [model.encode_response(text)[:limit] for text in texts]
    if len(responses) > 1 and all(response.equal(responses[0]) for response in responses):
        all_of_them = "chosen and rejected" if len(responses) == 2 else "all responses"
        raise PostgradError(
            f"{where}: {all_of_them} are the same after tokenisation ({limited_by}={limit})"
        )
    return responses


def pair_rows(model: TextNetwork, batch: Batch, most: int = 4) -> list[dict[str, Any]]:
    """Pairs for people to read."""
    return [
        {
            "prompt": model.decode(batch.prompts[i]),
            "chosen": model.decode(batch.responses[i][0]),
            "rejected": model.decode(batch.responses[i][-1]),
        }
        for i in range(min(len(batch), most))
    ]


def token_scores(
    policy: LanguagePolicy,
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[Tensor]],
    temperature: float = 1.0,
) -> TokenScores:
    """Scores of all responses, one row each, where every prompt has several."""
    repeated = [prompt for prompt, several in zip(prompts, responses, strict=True) for _ in several]
    flat = [response for several in responses for response in several]
    return policy.score(repeated, flat, temperature=temperature)


def response_logprobs(policy: LanguagePolicy, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log pi(y|x) `[B, K]` of a comparison batch, 0 where no response is present."""
    scores = token_scores(policy, batch.prompts, batch.responses, temperature)
    sums = sequence_logprobs(scores.logprobs, scores.mask)
    present = batch.present.to(sums.device)
    return torch.zeros(present.shape, dtype=sums.dtype, device=sums.device).masked_scatter(
        present, sums
    )


@torch.no_grad()
def known_logprobs(policy: LanguagePolicy, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The same without gradients, in float32 on the CPU: for a policy that stays as it is."""
    with timed("scoring"):
        parts = [
            response_logprobs(policy, part, temperature).float().cpu()
            for part in batch.split(SCORING_TOKENS)
        ]
    return torch.cat(parts)


def compared(
    policy: LanguagePolicy, batch: Batch, others: Sequence[str] = (), temperature: float = 1.0
) -> Compared:
    """The batch's responses under the policy, with gradients.

    The batch holds the reference's log-probabilities as `reference` (absent: zeros) and those
    called `others` under their names.
    """
    logprobs = response_logprobs(policy, batch, temperature)
    device = logprobs.device
    known = {name: batch.fields()[name].to(device) for name in ("reference", *others)
             if name in batch}  # fmt: skip
    reference = known.pop("reference", torch.zeros_like(logprobs))
    present = batch.present.to(device)
    return Compared(
        logprobs,
        torch.where(present, reference, 0.0),
        batch.lengths.to(device),
        batch.scores.to(device),
        present,
        known,
    )


def last(values: Tensor, present: Tensor) -> Tensor:
    """The value `[B]` of every row's last present response, in `[B, K]`."""
    return values.gather(1, present.sum(1, keepdim=True) - 1).squeeze(1)


def better(scores: Tensor, present: Tensor) -> Tensor:
    """`[B, K, K]` bool: response i is better than j.

    Lists are ordered by place, best first, unless scores are equal.
    """
    there = present.unsqueeze(-1) & present.unsqueeze(-2)
    return (there & (scores.unsqueeze(-1) != scores.unsqueeze(-2))).triu(1)


def accuracy(rewards: Tensor, scores: Tensor, present: Tensor) -> float:
    """The share of ordered pairs that `rewards` `[B, K]` order as the data do.

    Equal rewards, as at the reference, count half. Without any ordered pair the result is 1/2.
    """
    counts = better(scores, present)
    verdicts = 0.5 * ((rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).sign() + 1)
    return float(verdicts[counts].mean()) if bool(counts.any()) else 0.5


def comparison_metrics(rewards: Tensor, found: Compared) -> Metrics:
    """What is followed in training: implicit rewards `[B, K]` and likelihoods of best and worst."""
    rewards, likely = rewards.detach(), found.logprobs.detach()
    best, worst = rewards[:, 0], last(rewards, found.present)
    return {
        "rewards/chosen": float(best.mean()),
        "rewards/rejected": float(worst.mean()),
        "rewards/margin": float((best - worst).mean()),
        "rewards/accuracy": accuracy(rewards, found.scores, found.present),
        "logprobs/chosen": float(likely[:, 0].mean()),
        "logprobs/rejected": float(last(likely, found.present).mean()),
    }
