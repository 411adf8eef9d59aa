"""Unlabelled responses of the policy as it is now, which a reward model is to tell apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.methods.base import Place
from postgrad.methods.data import DataSettings, find_data
from postgrad.methods.language.base import RolloutSettings, draw_responses, render_prompts
from postgrad.methods.language.preference.base import Comparisons, ComparisonSettings
from postgrad.models.language import LanguagePolicy, load_policy
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


class ShiftedSettings(ComparisonSettings):
    """Settings of what MetaRM looks at."""

    meta_policy: str | None = setting(
        None, "MetaRM: the policy as it is now, whose responses the reward is to tell apart"
    )
    meta_data: DataSettings | None = setting(
        None, "MetaRM: its prompts (if empty, those of the pairs), or lists of its responses"
    )
    meta: MetaSettings = setting(MetaSettings(), "MetaRM's step")


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
        config: ShiftedSettings,
        place: Place,
    ):
        self._model, self._examples, self._policy = model, examples, policy
        self._config, self._place = config, place
        self._order = Epochs(len(examples), config.meta.prompts, place.seed)
        if policy is not None:
            policy.requires_grad_(False)
            room = config.meta.max_new_tokens
            self._prompts = render_prompts(policy, examples, config, reserve=room)
        else:
            self._lists = Comparisons(model, examples, config)

    def batch(self, step: int) -> Batch | None:
        """The lists of step `step`, the same whenever it is asked for; None if there are none."""
        index = self._order.indices(step)
        if self._policy is None:
            return self._lists.batch(index)
        rows = index.tolist()
        settings = self._config.meta
        samples = settings.samples
        rollout = RolloutSettings(samples=samples, max_new_tokens=settings.max_new_tokens)
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


def find_shifted_responses(
    model: ScalarModel,
    pairs: Examples,
    config: ShiftedSettings,
    place: Place,
    policy: LanguagePolicy | None = None,
    rows: Examples | list[dict[str, Any]] | None = None,
) -> ShiftedResponses | None:
    """What the settings name, or the caller gives; None if it is nothing."""
    if policy is None and config.meta_policy is not None:
        policy = load_policy(
            config.meta_policy,
            device=place.device,
            trust_remote_code=config.trust_remote_code,
            seed=place.seed,
        )
    if rows is None and config.meta_data is None:
        if policy is None:
            return None
        examples = pairs
    else:
        formats = "rankings" if policy is None else "prompts"
        named = config.meta_data or DataSettings(name="meta_data")
        examples = find_data(named, place, formats, rows)
    return ShiftedResponses(model, examples, policy, config, place)


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
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, theta, towards in zip(parameters, own, direction, strict=True):
                moved = parameter - theta.add(towards, alpha=rate)
                parameter.copy_(theta + moved)
