"""Responses sampled from a language policy, with their log-probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad import processes
from postgrad.errors import PostgradError
from postgrad.models.policy import LanguagePolicy
from postgrad.models.scoring import distinct
from postgrad.sampling.drawing import SamplingSettings, draw, uniform_stream
from postgrad.sampling.engines import Drawn, Wanted
from postgrad.sampling.mixture import ActionMask, decoding

__all__ = ["Rollouts", "SamplingSettings", "generate"]


@dataclass
class Rollouts:
    """N sampled responses; those of one prompt follow each other.

    Attributes:
        prompts: `[P]` each, repeated for every sample.
        responses: `[L]` each, L ≥ 1, with the end token where the response ended by one.
        logprobs: `[L]` each, float32: of the sampled tokens under the distribution they were drawn
            from (at the sampling temperature; after top-k and top-p, renormalised; at temperature
            0, that at temperature 1).
        finished: `[N]` bool: ended by an end token or a stop string; False if cut at a limit.
        texts: the responses without special tokens; a stop string is part of its text.
    """

    prompts: list[Tensor]
    responses: list[Tensor]
    logprobs: list[Tensor]
    finished: Tensor
    texts: list[str]


@torch.no_grad()
def generate(
    policy: LanguagePolicy,
    prompts: Sequence[Tensor],
    settings: SamplingSettings,
    *,
    samples: int | Sequence[int] = 1,
    seeds: Tensor | Sequence[int],
    mixture: float = 0.0,
    mask: ActionMask | None = None,
    limits: Sequence[int] | None = None,
) -> Rollouts:
    """Sample responses to prompts.

    Args:
        policy: what is sampled from; under bf16 autocast its matrices are used in bf16.
        prompts: token ids `[P]` each.
        settings: length, temperature, restrictions and stop strings.
        samples: how many for every prompt, or for each.
        seeds: `[N]`, one for each sample. A sample's draws come from its own seed alone, whatever
            else is in the batch.
        mixture: the reference policy's share c in what is drawn from, policy^(1 - c) reference^c
            of every next token; 0 is the policy alone, 1 the reference alone.
        mask: which tokens may be drawn at all; None allows every one.
        limits: `[N]`, the most tokens of each sample, where they are fewer than `max_new_tokens`.

    Raises:
        PostgradError: a prompt is empty or leaves no room in the model's context.
    """
    asked = wanted(policy, prompts, settings, samples=samples, seeds=seeds, limits=limits)
    engine = policy.engine
    if engine is not None and mixture == 0 and mask is None and not policy.is_reference:
        drawn = engine.draw(policy, asked)
    else:

        def draw_share(share: Sequence[int]) -> list[Drawn]:
            return draw_here(policy, asked.chosen(share), mixture, mask)

        with policy.whole():
            drawn = processes.divided(range(len(asked.prompts)), draw_share)
    return rollouts_of(policy, asked, drawn)


def wanted(
    policy: LanguagePolicy,
    prompts: Sequence[Tensor],
    settings: SamplingSettings,
    *,
    samples: int | Sequence[int],
    seeds: Tensor | Sequence[int],
    limits: Sequence[int] | None = None,
) -> Wanted:
    """What `generate` is to draw, checked: every response with its prompt, seed and limit."""
    counts = [samples] * len(prompts) if isinstance(samples, int) else list(samples)
    if len(counts) != len(prompts) or min(counts, default=0) < 1:
        raise ValueError(f"samples must be at least 1 for each of {len(prompts)} prompts: {counts}")
    repeated = [
        prompt.to(policy.device)
        for prompt, count in zip(prompts, counts, strict=True)
        for _ in range(count)
    ]
    if len(seeds) != len(repeated):
        raise ValueError(f"{len(repeated)} samples need as many seeds, got {len(seeds)}")
    rooms = [_limit(policy, prompt, settings) for prompt in repeated]
    if limits is not None:
        if len(limits) != len(repeated) or min(limits) < 1:
            raise ValueError(f"limits must be at least 1 for each of {len(repeated)} samples")
        rooms = [min(pair) for pair in zip(rooms, limits, strict=True)]
    return Wanted(repeated, settings, [int(seed) for seed in seeds], rooms)


def rollouts_of(policy: LanguagePolicy, asked: Wanted, drawn: Sequence[Drawn]) -> Rollouts:
    """The responses to what was asked for, on the policy's device and with their texts."""
    responses = [one.tokens.to(policy.device) for one in drawn]
    return Rollouts(
        prompts=asked.prompts,
        responses=responses,
        logprobs=[one.logprobs.to(policy.device) for one in drawn],
        finished=torch.tensor([one.finished for one in drawn], dtype=torch.bool),
        texts=[policy.decode(response) for response in responses],
    )


@torch.no_grad()
def draw_here(
    policy: LanguagePolicy, asked: Wanted, mixture: float = 0.0, mask: ActionMask | None = None
) -> list[Drawn]:
    """What an engine would draw, by the policy in this process."""
    repeated, settings, rooms = asked.prompts, asked.settings, torch.tensor(asked.limits)
    longest = int(rooms.max())
    uniforms = torch.stack([uniform_stream(seed, longest) for seed in asked.seeds])

    tokens = torch.zeros(len(repeated), longest, dtype=torch.long)
    logprobs = torch.zeros(len(repeated), longest)
    lengths = torch.zeros(len(repeated), dtype=torch.long)
    finished = torch.zeros(len(repeated), dtype=torch.bool)
    ended = _end_test(policy, settings)
    unique, owners = distinct(repeated)
    with decoding(policy, unique, owners, mixture, mask) as decoder:
        alive = torch.ones(len(decoder), dtype=torch.bool)
        samples_here = torch.tensor(decoder.order)
        uniforms = uniforms[samples_here].to(policy.device)
        for step in range(longest):
            drawn, drawn_logprobs = draw(decoder.logits(), uniforms[:, step], settings)
            here = samples_here[alive]
            tokens[here, step] = drawn.cpu()[alive]
            logprobs[here, step] = drawn_logprobs.float().cpu()[alive]
            lengths[here] = step + 1
            finished[here] = ended(tokens[here, : step + 1])
            full = lengths >= rooms
            alive = ~(finished | full)[samples_here]
            if not alive.any():
                break
            # what fills the context has to go: feeding it on would leave the context
            if (~alive).float().mean() >= decoder.worth_removing or full[samples_here].any():
                rows = alive.nonzero().squeeze(1).to(policy.device)
                decoder.keep(rows)
                drawn, uniforms = drawn[rows], uniforms[rows]
                samples_here, alive = samples_here[alive], alive[alive]
            decoder.feed(drawn)

    return [
        Drawn(row[:length], numbers[:length], bool(over))
        for row, numbers, length, over in zip(tokens, logprobs, lengths, finished, strict=True)
    ]


def _limit(policy: LanguagePolicy, prompt: Tensor, settings: SamplingSettings) -> int:
    if len(prompt) == 0:
        raise PostgradError("a prompt has no tokens: at least one is needed to sample from")
    room = policy.context_length - len(prompt)
    if room < 1:
        raise PostgradError(
            f"a prompt of {len(prompt)} tokens leaves no room for a response in the model's "
            f"context of {policy.context_length}: shorten it"
        )
    return min(settings.max_new_tokens, room)


def _end_test(policy: LanguagePolicy, settings: SamplingSettings) -> Callable[[Tensor], Tensor]:
    """Says of responses so far `[n, step + 1]` which of them `[n]` have just ended."""
    ends = torch.tensor(sorted(policy.end_tokens), dtype=torch.long)
    # a stop string of c characters, ended by the newest token, lies within its last c + 1 tokens,
    # give or take tokens that hold only a part of a character
    reach = max((len(word) for word in settings.stop), default=0) * 4 + 1

    def ended(so_far: Tensor) -> Tensor:
        over = torch.isin(so_far[:, -1], ends)
        if settings.stop:
            tails = [policy.decode(row[-reach:]) for row in so_far]
            over |= torch.tensor([any(word in tail for word in settings.stop) for tail in tails])
        return over

    return ended
