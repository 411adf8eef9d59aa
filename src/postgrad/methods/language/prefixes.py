"""Beginnings of responses as states, and the steps that completions of them try first."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.steps import state_means
from postgrad.batch import Batch
from postgrad.methods.language.base import RolloutSettings
from postgrad.models.language import LanguagePolicy
from postgrad.sampling.generation import generate
from postgrad.sampling.steps import step_ends
from postgrad.seeding import derive
from postgrad.timing import timed

_DRAWN_AT_ONCE = 1024  # completions


class Splitter:
    """Says where the steps of a response end, after which of its tokens."""

    def __init__(self, policy: LanguagePolicy, delimiter: str):
        self._policy = policy
        self._delimiter = delimiter
        self._texts: dict[int, str] = {}

    def __call__(self, response: Tensor) -> list[int]:
        ids = response.tolist()
        for i in ids:
            if i not in self._texts:
                self._texts[i] = self._policy.decode(torch.tensor([i]))
        return step_ends([self._texts[i] for i in ids], self._delimiter)

    def beginnings(self, responses: Iterable[Tensor], most: int) -> list[Tensor]:
        """The different tokens before a step, the first one's none, of fewer than `most`."""
        found: dict[tuple[int, ...], Tensor] = {}
        for response in responses:
            for start in [0, *self(response)[:-1]]:
                if start < most:
                    found.setdefault(tuple(response[:start].tolist()), response[:start])
        return list(found.values())


def completions(
    policy: LanguagePolicy,
    prompts: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    rollout: RolloutSettings,
    seed: int,
    *stream: str | int,
) -> list[Tensor]:
    """`rollout.samples` completions of every prefix, one prefix's after the other.

    A prefix and its completion together have at most `rollout.max_new_tokens`.
    """
    samples, most = rollout.samples, rollout.max_new_tokens
    contexts = [torch.cat(pair) for pair in zip(prompts, prefixes, strict=True)]
    size = max(1, _DRAWN_AT_ONCE // samples)
    drawn: list[Tensor] = []
    with timed("rollout"), torch.no_grad():
        for start in range(0, len(contexts), size):
            places = range(start, min(start + size, len(contexts)))
            drawn += generate(
                policy,
                [contexts[i] for i in places],
                rollout.sampling(),
                samples=samples,
                seeds=[derive(seed, *stream, i, k) for i in places for k in range(samples)],
                limits=[most - len(prefixes[i]) for i in places for _ in range(samples)],
            ).responses
    return drawn


def tried_steps(
    prompts: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    completed: Sequence[Tensor],
    rewards: Tensor,
    ends: Callable[[Tensor], list[int]],
) -> Batch:
    """The different first steps of completions, one item each.

    Args:
        prompts: of the states, `[P]` each.
        prefixes: of the states, `[L]` each.
        completed: completions, as many for each state, one state's after the other.
        rewards: `[N]` of the completions.
        ends: where the steps of a completion end.

    Returns:
        prompts (with the prefix) and responses (the steps), `state`, `counts` of completions that
        begin with the step, `outcomes`, their mean reward, and whether the step is `final`: it
        ends the response. All of a state follow each other, in order of appearance.
    """
    samples = len(completed) // len(prefixes)
    found: dict[tuple[int, ...], tuple[int, int, list[float]]] = {}
    for i, completion in enumerate(completed):
        end = ends(completion)[0]
        key = (i // samples, *completion[:end].tolist())
        found.setdefault(key, (i, end, []))[2].append(float(rewards[i]))
    contexts = [torch.cat(pair) for pair in zip(prompts, prefixes, strict=True)]
    steps = [completed[first][:end] for first, end, _ in found.values()]
    state = torch.tensor([first // samples for first, _, _ in found.values()])
    own = [contexts[i] for i in state.tolist()]
    return Batch(
        prompts=own,
        responses=steps,
        state=state,
        counts=torch.tensor([len(values) for _, _, values in found.values()]),
        outcomes=torch.tensor([sum(values) / len(values) for _, _, values in found.values()]),
        final=torch.tensor([end == len(completed[i]) for i, end, _ in found.values()]),
        cost=torch.tensor([len(step) for step in steps]),
        shared_cost=torch.tensor([len(context) for context in own]),
    )


def first_of_each(state: Tensor) -> Tensor:
    """The place of the first item of every state, whose items follow each other in `[n]`."""
    return torch.cat([torch.zeros(1, dtype=torch.long), state.diff().nonzero().squeeze(1) + 1])


def states_of(tried: Batch) -> Batch:
    """The states of tried steps, with the share `success` of their completions that succeeded.

    The steps have the fields `group` and `step` besides those of `tried_steps`.
    """
    first = first_of_each(tried.state)
    success = state_means(tried.outcomes, tried.counts, tried.state)
    states = tried.select(first)
    return Batch(
        prompts=states.prompts,
        responses=[prompt[:0] for prompt in states.prompts],
        success=success,
        group=states.group,
        step=states.step,
        cost=states.shared_cost,
    )


def flattened(steps: Batch) -> dict[str, Any]:
    """Tried steps as tensors, each state's prompt once: for checkpoints."""
    fields = steps.fields()
    prompts, responses = fields.pop("prompts"), fields.pop("responses")
    first = first_of_each(steps.state).tolist()
    return {**fields, "prompts": torch.cat([prompts[i] for i in first]),
            "responses": torch.cat(responses)}  # fmt: skip


def restored(state: dict[str, Any], device: torch.device) -> Batch:
    """The tried steps that were `flattened`."""
    fields = dict(state)
    first = first_of_each(fields["state"])
    sizes = fields["shared_cost"][first].tolist()
    prompts = fields.pop("prompts").to(device).split(sizes)
    counts = torch.cat([first, torch.tensor([len(fields["state"])])]).diff().tolist()
    responses = fields.pop("responses").to(device).split(fields["cost"].tolist())
    return Batch(
        prompts=[prompt for prompt, n in zip(prompts, counts, strict=True) for _ in range(n)],
        responses=list(responses),
        **fields,
    )
