"""Unlabelled responses of the policy as it is now, which a reward model is to tell apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.base import RolloutSettings, draw_responses, render_prompts
from postgrad.methods.language.preference.base import Comparisons, ComparisonSettings
from postgrad.models.language import LanguagePolicy
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.reward_modeling import spread_of_rewards
from postgrad.sampling.epochs import Epochs
from postgrad.tasks import Examples
from postgrad.timing import timed

_TOKENS = 2048  # in one forward pass with gradients


class MetaSettings(Settings):
    """MetaRM's step towards telling new responses apart."""

    rate: float = setting(
        0.01, "eta, the step along the gradient of J; 0: none; the paper's is not known", ge=0
    )
    prompts: int = setting(8, "prompts a step, m", gt=0)
    samples: int = setting(4, "responses a prompt, k, of meta_policy", ge=2)
    max_new_tokens: int = setting(64, "completion budget of meta_policy in tokens", gt=0)


class ShiftedResponses:
    """Batches of prompts with several responses each: lists that are given, or fresh samples.

    Responses of a policy are drawn anew in every step; those that are empty or repeated are left
    out, and so are prompts with fewer than two.
    """

    def __init__(
        self,
        model: ScalarModel,
        examples: Examples,
        policy: LanguagePolicy | None,
        config: ComparisonSettings,
        settings: MetaSettings,
        place: Place,
    ):
        self._model, self._examples, self._policy = model, examples, policy
        self._config, self._settings, self._place = config, settings, place
        self._order = Epochs(len(examples), settings.prompts, place.seed)
        if policy is not None:
            policy.requires_grad_(False)
            room = settings.max_new_tokens
            self._prompts = render_prompts(policy, examples, config, reserve=room)
        elif examples.format != "rankings":
            raise PostgradError(
                f"meta_data: {examples.name} has no lists of responses: expected the columns prompt "
                "and responses, or a meta_policy that samples them"
            )
        else:
            self._lists = Comparisons(model, examples, config)

    def batch(self, step: int) -> Batch | None:
        """The lists of step `step`, the same whenever it is asked for; None if there are none."""
        index = self._order.indices(step)
        if self._policy is None:
            return self._lists.batch(index)
        rows = index.tolist()
        samples = self._settings.samples
        rollout = RolloutSettings(samples=samples, max_new_tokens=self._settings.max_new_tokens)
        drawn = draw_responses(
            self._policy, [self._prompts[i] for i in rows], rollout, self._place.seed, "meta", step
        )
        found: list[dict[str, Any]] = []
        for place, number in enumerate(rows):
            texts = drawn.texts[place * samples : (place + 1) * samples]
            several = list(dict.fromkeys(text for text in texts if text.strip()))
            if len(several) > 1:
                found.append({"prompt": self._examples[number]["prompt"], "responses": several})
        if not found:
            return None
        lists = Examples.from_rows(
            found, name="meta_policy", format="rankings", chat=self._examples.chat
        )
        return Comparisons(self._model, lists, self._config).batch(torch.arange(len(found)))

    def spread(self, step: int) -> tuple[float, list[Tensor]]:
        """J of the step's responses, and its gradient by the model's parameters, in their order."""
        parameters = trainable(self._model)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        total = 0.0
        batch = self.batch(step)
        if batch is None:
            return total, gradients
        with timed("meta"), torch.enable_grad():
            for part in batch.split(_TOKENS):
                value = self._spread(part).sum() / batch.items
                found = torch.autograd.grad(value, parameters, materialize_grads=True)
                for gradient, more in zip(gradients, found, strict=True):
                    gradient += more
                total += value.item()
        return total, gradients

    def _spread(self, batch: Batch) -> Tensor:
        lists = zip(batch.prompts, batch.responses, strict=True)
        prompts = [prompt for prompt, several in lists for _ in several]
        flat = self._model.rewards(prompts, [r for several in batch.responses for r in several])
        present = batch.present.to(flat.device)
        rewards = torch.zeros(present.shape, device=flat.device).masked_scatter(present, flat)
        return spread_of_rewards(rewards, present)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def displaced(module: nn.Module, direction: list[Tensor], rate: float) -> Iterator[None]:
    """Inside, the weights are theta + rate * direction; what they move by there moves theta.

    So a step that is taken inside, with the gradient found there, is applied to theta.
    """
    parameters = trainable(module)
    own = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, towards in zip(parameters, direction, strict=True):
            parameter.add_(towards, alpha=rate)
    there = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, theta, shifted in zip(parameters, own, there, strict=True):
                parameter.copy_(theta + (parameter - shifted))
