"""Responses that are written over several steps: slots, refilled as they empty."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.generation import Rollouts, SamplingSettings, generate
from postgrad.seeding import derive


@dataclass(frozen=True)
class Windows:
    """What one step added to the responses in N slots.

    Attributes:
        items: which response each is, counted from 0 over the run.
        prompts: `[P]` each.
        rollouts: the new tokens, after prompt and earlier tokens as their prompts.
        whole: `[L]` each: the response so far, these tokens included.
        complete: `[N]` bool: ended by an end token, or as long as it may be.
    """

    items: list[int]
    prompts: list[Tensor]
    rollouts: Rollouts
    whole: list[Tensor]
    complete: Tensor


class Slots:
    """N responses in progress. What is complete makes room for a new one in the next step."""

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"there must be at least one slot, got {count}")
        self._count = count
        self._begun: dict[int, Tensor] = {}  # the tokens so far of what is not complete
        self._next = 0

    def advance(
        self,
        policy: LanguagePolicy,
        prompt_of: Callable[[int], Tensor],
        settings: SamplingSettings,
        window: int,
        seed: int,
    ) -> Windows:
        """Continue every response by at most `window` tokens, up to `max_new_tokens` in all.

        `prompt_of` gives the prompt `[P]` of a response. A draw depends on the seed, the response
        and the place in it, and not on the slot. The settings may have no stop strings, which
        could lie across two windows.
        """
        if window < 1 or settings.stop:
            raise ValueError(f"expected a window of a token and no stop strings, got {window}")
        while len(self._begun) < self._count:
            self._begun[self._next] = prompt_of(self._next)[:0]
            self._next += 1
        items = list(self._begun)
        prompts = [prompt_of(item) for item in items]
        before = [self._begun[item].to(policy.device) for item in items]
        rollouts = generate(
            policy,
            [
                torch.cat([prompt.to(policy.device), tokens])
                for prompt, tokens in zip(prompts, before, strict=True)
            ],
            replace(settings, max_new_tokens=window),
            seeds=[
                derive(seed, "window", item, len(tokens))
                for item, tokens in zip(items, before, strict=True)
            ],
            limits=[min(window, settings.max_new_tokens - len(tokens)) for tokens in before],
        )
        whole = [torch.cat(pair) for pair in zip(before, rollouts.responses, strict=True)]
        full = torch.tensor([len(tokens) >= settings.max_new_tokens for tokens in whole])
        complete = rollouts.finished | full
        self._begun = {
            item: tokens
            for item, tokens, done in zip(items, whole, complete.tolist(), strict=True)
            if not done
        }
        return Windows(items, prompts, rollouts, whole, complete)

    def state_dict(self) -> dict[str, Any]:
        begun = {str(item): tokens for item, tokens in self._begun.items()}
        return {"next": self._next, "begun": begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]
        self._begun = {int(item): tokens for item, tokens in state["begun"].items()}
