"""Sampled responses as a batch: made, described and shown."""

from typing import Any

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.methods.base import Metrics
from postgrad.methods.language.base import pad
from postgrad.models.language import LanguagePolicy
from postgrad.sampling.conversations import Conversations
from postgrad.sampling.generation import Rollouts

TERM = "reward/"


def rollout_batch(
    rollouts: Rollouts,
    step: int,
    *,
    group: Tensor,
    reward: Tensor,
    terms: dict[str, Tensor],
    **fields: Any,
) -> Batch:
    """Rollouts as a batch, with each one's group, reward, reward terms `[N]`, and more fields."""
    lengths = torch.tensor([len(response) for response in rollouts.responses])
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    if isinstance(rollouts, Conversations):
        mask = pad(rollouts.written)  # what a tool said was not the policy's choice
        fields = {"written": mask, "turns": pad(rollouts.turns), **fields}
    named = {f"{TERM}{name}": term for name, term in terms.items()}
    return Batch(
        prompts=rollouts.prompts,
        responses=rollouts.responses,
        mask=mask,
        cost=lengths,
        shared_cost=torch.tensor([len(prompt) for prompt in rollouts.prompts]),
        group=group,
        reward=reward.float(),
        sampled_logprobs=pad(rollouts.logprobs),
        finished=rollouts.finished,
        texts=rollouts.texts,
        step=torch.full((len(lengths),), step),
        **{**fields, **named},
    )


def describe_rollouts(batch: Batch) -> Metrics:
    """Means of reward, its terms, length and surprise."""
    terms = [name for name in batch.fields() if name.startswith(TERM)]
    lengths = torch.tensor([float(len(response)) for response in batch.responses])
    drawn = torch.arange(batch.sampled_logprobs.shape[1]) < lengths[:, None]
    if "written" in batch:
        drawn = drawn & batch.written
    advantages = batch.advantages if batch.advantages.dim() == 1 else batch.advantages[batch.mask]
    return {
        "reward": float(batch.reward.mean()),
        **{name: float(batch.fields()[name].mean()) for name in terms},
        "response/length": float(lengths.mean()),
        "response/truncated": float((~batch.finished).float().mean()),
        # the mean surprise of what was sampled estimates the entropy without another pass
        "response/entropy": float(-batch.sampled_logprobs[drawn].mean()),
        "advantage/spread": float(advantages.std(correction=0)),
    }


def rollout_rows(policy: LanguagePolicy, batch: Batch, most: int = 16) -> list[dict[str, Any]]:
    """Rows for people to read; `batch.advantages` is `[N]`, or `[N, T]` where tokens differ."""
    terms = {n: values for n, values in batch.fields().items() if n.startswith(TERM)}
    rows = []
    for i in range(min(len(batch), most)):
        tokens = batch.responses[i]
        own = batch.advantages[i]
        advantages = own[: len(tokens)] if own.dim() else own.expand(len(tokens))
        advantages = advantages * batch.mask[i, : len(tokens)]
        rows.append(
            {
                "prompt": policy.decode(batch.prompts[i]),
                "response": batch.texts[i],
                "reward": float(batch.reward[i]),
                **{name: float(values[i]) for name, values in terms.items()},
                "advantage": float(advantages.mean()) if len(tokens) else 0.0,
                "tokens": [policy.decode(token[None]) for token in tokens],
                "advantages": advantages.tolist(),
            }
        )
    return rows
