"""Responses that one speaker begins and another ends."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.generation import Rollouts, SamplingSettings, generate

# def guide(prompts, beginnings) -> rests: prompts as in the data, all else text
Continue = Callable[[list[Any], list[str]], list[str]]
Row = Mapping[str, Any]


class Speaker(Protocol):
    """Who can go on with a response from any beginning."""

    def __call__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Tensor],
        beginnings: Sequence[Tensor],
        seeds: Sequence[int],
    ) -> Rollouts:
        """Whole responses that start with the `beginnings` `[h]` (h may be 0), one a row."""
        ...


class PolicySpeaker:
    """A language policy as a speaker; `max_new_tokens` counts the beginning too.

    The log-probabilities of a beginning, which it did not draw, are 0.
    """

    def __init__(self, policy: LanguagePolicy, settings: SamplingSettings):
        self._policy = policy
        self._settings = settings

    def __call__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Tensor],
        beginnings: Sequence[Tensor],
        seeds: Sequence[int],
    ) -> Rollouts:
        device = self._policy.device
        begun = [beginning.to(device) for beginning in beginnings]
        drawn = generate(
            self._policy,
            [torch.cat([p.to(device), b]) for p, b in zip(prompts, begun, strict=True)],
            self._settings,
            seeds=seeds,
            limits=[self._settings.max_new_tokens - len(b) for b in begun],
        )
        responses = [torch.cat([b, r]) for b, r in zip(begun, drawn.responses, strict=True)]
        return Rollouts(
            prompts=[prompt.to(device) for prompt in prompts],
            responses=responses,
            logprobs=[
                torch.cat([torch.zeros_like(b, dtype=torch.float32), logprobs])
                for b, logprobs in zip(begun, drawn.logprobs, strict=True)
            ],
            finished=drawn.finished,
            texts=[self._policy.decode(response) for response in responses],
        )


class TextSpeaker:
    """A function of texts as a speaker: a larger model of other tokens, a service, a rule.

    What it says becomes tokens of `policy`. A response that needs fewer of them than
    `max_new_tokens` is ended by an end token, a longer one is cut. The function draws as it likes,
    and a seed does not reach it.
    """

    def __init__(self, function: Continue, policy: LanguagePolicy, max_new_tokens: int):
        self._function = function
        self._policy = policy
        self._most = max_new_tokens

    def __call__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Tensor],
        beginnings: Sequence[Tensor],
        seeds: Sequence[int],
    ) -> Rollouts:
        device = self._policy.device
        spoken = [self._policy.decode(beginning) for beginning in beginnings]
        rests = self._function([row["prompt"] for row in rows], spoken)
        if not isinstance(rests, list) or len(rests) != len(rows):
            raise PostgradError(
                f"guide: expected a list of {len(rows)} texts, one for each beginning, got "
                f"{len(rests) if isinstance(rests, list) else type(rests).__name__}"
            )
        whole = [
            torch.cat([b.to(device), self._policy.encode_response(_text(rest))])
            for b, rest in zip(beginnings, rests, strict=True)
        ]
        responses = [tokens[: self._most] for tokens in whole]
        return Rollouts(
            prompts=[prompt.to(device) for prompt in prompts],
            responses=responses,
            logprobs=[torch.zeros_like(r, dtype=torch.float32) for r in responses],
            finished=torch.tensor([len(tokens) <= self._most for tokens in whole]),
            texts=[self._policy.decode(response) for response in responses],
        )


def _text(rest: Any) -> str:
    if not isinstance(rest, str):
        raise PostgradError(f"guide: expected texts, got {type(rest).__name__}")
    return rest
