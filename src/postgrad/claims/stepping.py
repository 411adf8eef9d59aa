"""Training a method step by step inside a claim, which looks at the policy between steps."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from postgrad.api import build
from postgrad.batch import Batch
from postgrad.catalogue import method_class
from postgrad.config import resolve
from postgrad.methods.base import Method, Metrics, NothingToLearn, Place
from postgrad.seeding import seed_everything
from postgrad.training.optimise import Optimisers

Collect = Callable[[Any, int], Batch]


def own_batch(method: Method, step: int) -> Batch:
    """What the method itself collects."""
    return method.collect(step)


def train_in_steps(
    slug: str,
    seed: int,
    objects: Mapping[str, Any],
    collect: Collect = own_batch,
    /,
    **settings: Any,
) -> Iterator[tuple[int, Metrics]]:
    """The real method under the loop's optimiser, on the CPU and without a run folder.

    `objects` are what the method takes from Python (`model`, `data`, `reward`); the caller keeps
    the model and sees it change. `collect(method, step)` may record what the method collects, or
    give it other batches. Yields each step's number, from 1, and metrics (none where there was
    nothing to learn).
    """
    kind = method_class(slug)
    loop, own = resolve(kind.Config, kind.recipe, {"seed": seed, **settings})
    seed_everything(seed)
    place = Place(seed, torch.device("cpu"), loop.steps)
    method = build(slug, own, place, objects)
    method.check()
    optimise = Optimisers(method.modules(), loop, place.device, method.rates())
    for step in range(loop.steps):
        optimise.set_step(step)
        try:
            batch = collect(method, step)
        except NothingToLearn:
            yield step + 1, {}
            continue
        yield step + 1, {**method.describe_batch(batch), **method.update(batch, optimise)}
