"""What the language methods share: their settings, and how a policy and its data are found."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.data import DataSettings, find_data, find_held_out
from postgrad.methods.language.engines import EngineSettings, attach_engine
from postgrad.models.adapters import LoraSettings
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.models.text_network import TextNetwork
from postgrad.sampling.epochs import Epochs
from postgrad.sampling.generation import Rollouts, SamplingSettings, generate
from postgrad.sampling.mixture import ActionMask
from postgrad.seeding import derive, generator
from postgrad.tasks import Examples
from postgrad.timing import timed


class RolloutSettings(EngineSettings):
    """How the policy is sampled."""

    samples: int = setting(8, "completions a prompt (the group)", gt=0)
    max_new_tokens: int = setting(64, "completion budget in tokens", gt=0)
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    top_p: float = setting(1.0, "nucleus: smallest set of tokens with this mass", gt=0, le=1)
    top_k: int = setting(0, "only the k likeliest tokens; 0: all", ge=0)
    stop: list[str] = setting([], "strings that end a completion")

    def sampling(self, temperature: float | None = None) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop),
        )

    def require_unaltered(self, why: str) -> None:
        """Stop unless samples come from the very distribution that is scored."""
        for name, value, expected in (
            ("temperature", self.temperature, 1.0),
            ("top_p", self.top_p, 1.0),
            ("top_k", self.top_k, 0),
        ):
            if value != expected:
                raise PostgradError(
                    f"rollout.{name}: expected {expected:g}, got {value:g}: {why} is estimated by "
                    "samples of the policy itself"
                )


class LanguageSettings(Settings):
    """Settings of every method that trains a causal language model."""

    flips_verdicts: ClassVar[bool] = False  # data.flip_rate is no concern of the data then

    model: str = setting("smollm2", "smollm2, tiny, a local folder, or a Hugging Face id")
    data: DataSettings = setting(DataSettings(name="docstrings"), "training data")
    eval_data: DataSettings | None = setting(None, "held-out data; the task's test split if empty")
    eval_size: int = setting(128, "how many held-out rows an evaluation uses", gt=0)
    batch_size: int = setting(8, "rows of data a step", gt=0)
    tune: Literal["full", "lora"] = setting("full", "train all weights, or low-rank adapters")
    lora: LoraSettings = setting(LoraSettings(), "adapters, with tune=lora")
    trust_remote_code: bool = setting(False, "run code that a model repository brings along")
    max_prompt_tokens: int | None = setting(
        None, "longest prompt; an error beyond it, the context when empty", gt=0
    )


class GivenData(TypedDict, total=False):
    """Data that a caller in Python may pass in place of names."""

    data: Examples | list[dict[str, Any]]
    eval_data: Examples | list[dict[str, Any]]


class Given(GivenData, total=False):
    """Objects that a caller in Python may pass in place of names."""

    model: LanguagePolicy


@dataclass(frozen=True)
class Materials:
    """What a method on a language model works with; `held_out` has at most `eval_size` rows."""

    policy: LanguagePolicy
    data: Examples
    held_out: Examples | None
    order: Epochs


def find_materials(
    config: LanguageSettings,
    place: Place,
    formats: str | tuple[str, ...],
    given: Given,
    *,
    held_out_formats: str | tuple[str, ...] | None = None,
    corrected: bool = False,
) -> Materials:
    """The data in (one of) the formats and the policy that `config` names, or those `given`.

    `corrected` says that what is learnt from an engine's samples is right (see `attach_engine`).
    """
    data, held_out, order = find_examples(
        config, place, formats, given, held_out_formats=held_out_formats
    )
    policy = find_policy(config, place, given, corrected=corrected)
    return Materials(policy, data, held_out, order)


def find_examples(
    config: LanguageSettings,
    place: Place,
    formats: str | tuple[str, ...],
    given: GivenData,
    *,
    held_out_formats: str | tuple[str, ...] | None = None,
) -> tuple[Examples, Examples | None, Epochs]:
    """The training data, at most `eval_size` rows of held-out data, and the order of training."""
    rows = given.get("data")
    unspoilt = config.data.model_copy(update={"flip_rate": 0.0})
    data = find_data(unspoilt if config.flips_verdicts else config.data, place, formats, rows)
    formats = held_out_formats or formats
    if "eval_data" in given:
        held_out: Examples | None = find_data(unspoilt, place, formats, given["eval_data"])
    else:
        held_out = find_held_out(config, place, formats, rows)
    return (
        data,
        held_out.first(config.eval_size) if held_out is not None else None,
        Epochs(len(data), config.batch_size, place.seed),
    )


def find_policy(
    config: LanguageSettings,
    place: Place,
    given: Given,
    *,
    corrected: bool = False,
    ahead: bool = False,
) -> LanguagePolicy:
    """The policy that `config` names, or the one given, with the engine that draws for it."""
    policy = given["model"] if "model" in given else named_policy(config, place)
    rollout = getattr(config, "rollout", None)  # methods that do not sample have none
    if rollout is not None:
        attach_engine(policy, rollout, place, corrected=corrected, ahead=ahead)
    return policy


def named_policy(config: LanguageSettings, place: Place) -> LanguagePolicy:
    """The policy that `config` names."""
    return load_policy(
        config.model,
        tune=config.tune,
        lora=config.lora,
        device=str(place.device),
        trust_remote_code=config.trust_remote_code,
        seed=place.seed,
    )


def render_prompts(
    policy: TextNetwork, examples: Examples, config: LanguageSettings, reserve: int
) -> list[Tensor]:
    """Token ids of every prompt; stops at one that leaves no room for `reserve` more tokens.

    Tasks whose prompts are meant for chat models come as a user turn where the model has a chat
    template.
    """
    room = policy.context_length - reserve
    limit = min(config.max_prompt_tokens or room, room)
    if limit < 1:
        raise PostgradError(
            f"max_new_tokens: {reserve} leaves no room for a prompt in the model's context of "
            f"{policy.context_length} tokens"
        )
    prompts = []
    for number, row in enumerate(examples.rows):
        ids = render_prompt(policy, examples, row["prompt"])
        if len(ids) > limit:
            raise PostgradError(
                f"{examples.where(number)}: the prompt has {len(ids)} tokens, at most {limit} fit "
                f"(context {policy.context_length}, {reserve} kept for the response)"
            )
        prompts.append(ids)
    return prompts


def render_prompt(
    policy: TextNetwork, examples: Examples, prompt: str | list[dict[str, Any]]
) -> Tensor:
    """Token ids `[P]` of a prompt that is written as those of `examples` are."""
    if examples.chat and policy.has_chat_template and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return policy.render(prompt)


def draw_responses(
    policy: LanguagePolicy,
    prompts: list[Tensor],
    rollout: RolloutSettings,
    seed: int,
    *stream: str | int,
    samples: int | None = None,
    temperature: float | None = None,
    mixture: float = 0.0,
    mask: ActionMask | None = None,
) -> Rollouts:
    """`samples` responses to every prompt, as `rollout` says where the arguments do not.

    `stream` names the draws: responses under another name are independent. `mixture` is the share
    of the reference policy in what is drawn from, `mask` what may be drawn (see `generate`).
    """
    samples = samples or rollout.samples
    seeds = response_seeds(seed, len(prompts), samples, *stream)
    with timed("rollout"), torch.no_grad():
        return generate(
            policy,
            prompts,
            rollout.sampling(temperature),
            samples=samples,
            seeds=seeds,
            mixture=mixture,
            mask=mask,
        )


def response_seeds(seed: int, prompts: int, samples: int, *stream: str | int) -> list[int]:
    """A seed for each of `samples` responses to each prompt."""
    return [
        derive(seed, *stream, prompt, sample)
        for prompt in range(prompts)
        for sample in range(samples)
    ]


def require_minibatches(minibatches: int, batch_size: int) -> None:
    """Stop at more optimiser steps a pass than there are prompts."""
    if minibatches > batch_size:
        raise PostgradError(
            f"minibatches: {minibatches} optimiser steps cannot share the prompts of a "
            f"batch_size of {batch_size}: at most one step a prompt"
        )


def prompt_minibatches(batch: Batch, epochs: int, minibatches: int, seed: int) -> Iterator[Batch]:
    """The batch of each optimiser step: whole prompts (`group`), shuffled anew in every epoch.

    With one step it is the batch as it is.
    """
    if epochs * minibatches == 1:
        yield batch
        return
    groups = batch.group.unique()
    for epoch in range(epochs):
        random = generator(seed, "minibatches", int(batch.step[0]), epoch)
        order = groups[torch.randperm(len(groups), generator=random)]
        for part in order.tensor_split(min(minibatches, len(order))):
            yield batch.select(torch.isin(batch.group, part).nonzero().squeeze(1))


def pad(values: list[Tensor], length: int | None = None) -> Tensor:
    """Ragged rows as one tensor `[N, T]`, zero on the right."""
    length = max((len(v) for v in values), default=0) if length is None else length
    padded = torch.zeros(len(values), length, dtype=values[0].dtype)
    for row, value in enumerate(values):
        padded[row, : len(value)] = value
    return padded
