"""Group Contrastive Policy Optimization."""

import re
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.advantages.group_contrast import bounded_length, group_contrast_mask
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import Given, render_prompts
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.rollouts import rollout_batch
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.sampling.generation import Rollouts

_PROMPT = "{prompt}"


class GCPOSettings(RewardedPolicyGradientSettings):
    """Settings of group contrastive policy optimisation."""

    contrast: Literal["prompted", "partition"] = setting(
        "prompted", "responses with and without the behaviour: two more groups that are asked for "
        "it and asked not to, or the group itself, divided", source="paper (uncertain)",
    )  # fmt: skip
    auxiliary: str = setting(
        r"<aux>[^<]*\w[^<]*</aux>|\\(draw|coordinate)\b",
        "regular expression of the behaviour: found in a response, it counts", min_length=1,
    )  # fmt: skip
    ask_for: str = setting(
        "{prompt}\n\nMake an auxiliary construction first and write it between <aux> and </aux>.",
        "the prompt of the responses with the behaviour",
    )
    ask_not: str = setting(
        "{prompt}\n\nDo not make any auxiliary construction.",
        "the prompt of the responses without it",
    )
    contrast_samples: int = setting(4, "responses to each of the two", gt=0)
    train_contrast: bool = setting(
        False, "learn from those responses too, both groups as one (uncertain)"
    )
    tolerance: float = setting(
        0.1, "eps: difference of accuracies within which the behaviour does not matter", ge=0
    )
    auxiliary_weight: float = setting(0.5, "w_aux: of the behaviour, times its mask", ge=0)
    length_weight: float = setting(0.1, "w_len: of the length", ge=0)
    reference_length: int | None = setting(
        None, "tokens from which on length is worth no more; max_new_tokens if empty", gt=0
    )
    length_if_correct: bool = setting(False, "only correct responses are rewarded for length")
    format: str = setting("", "regular expression that a whole response should match; empty: any")
    format_weight: float = setting(0.5, "w_fmt: of a match", ge=0)
    advantage: AdvantageChoice = setting(
        {"name": "standardised", "eps": 1e-6}, "from rewards to advantages"
    )
    aggregation: Aggregation = setting("sequence-mean", "how token losses become one")
    kl_coefficient: float = setting(0.001, "weight of the KL to the initial policy", ge=0)


class GCPO(PolicyGradient):
    """Group Contrastive Policy Optimization (Wang et al. 2025, GeometryZero, arXiv:2506.07160).

    Auxiliary constructions help with some problems of geometry and hurt with others; rewarding them
    always makes the policy construct everywhere. Here each problem says itself, by the accuracies
    of responses with and without: construction is rewarded, penalised or ignored. It goes for any
    optional behaviour that a regular expression finds (a scratchpad, a tool call, code).

        D(q) = mean accuracy with - mean accuracy without
        M(q) = 1 if D > eps, -1 if D < -eps, 0 otherwise
        R    = accuracy + w_fmt format + w_aux M(q) auxiliary + w_len min(|y| / L, 1)
        A    = (R - mean(R)) / (std(R) + 1e-6) in the group,     then GRPO's loss

    With `contrast=prompted` the accuracies are of two more groups of responses, whose prompts ask
    for the behaviour and forbid it; `contrast=partition` divides the group itself, for nothing
    more, and M = 0 where all of it is on one side. Weights, tolerance, prompts and the shape of the
    length term are not known from the paper (uncertain). So that no wrong response is worth more
    than a right one, one of the wrong format has accuracy 0 and w_aux + w_len must be below 1.
    `advantage=centred` leaves small differences of all-correct groups small.
    """

    Config = GCPOSettings
    config: GCPOSettings

    def __init__(
        self, config: GCPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        together = config.auxiliary_weight + config.length_weight
        if together >= 1:
            raise PostgradError(
                "auxiliary_weight, length_weight: must be below 1 together, so that no wrong "
                f"response is worth more than a right one, got {together:g}"
            )
        self._auxiliary = _expression("auxiliary", config.auxiliary)
        self._format = _expression("format", config.format)
        for name in ("ask_for", "ask_not") if config.contrast == "prompted" else ():
            if _PROMPT not in getattr(config, name):
                raise PostgradError(
                    f"{name}: contrast=prompted needs a prompt with {_PROMPT} in it, got "
                    f"{getattr(config, name)!r}"
                )
        super().__init__(config, place, reward=reward, **given)
        if config.contrast == "prompted" and self.tool is not None:
            raise PostgradError(
                "tool: contrast=prompted asks for single turns: contrast=partition goes with tools"
            )
        if config.contrast == "prompted":
            self._asked = [self._instructed(text) for text in (config.ask_for, config.ask_not)]

    def _instructed(self, instruction: str) -> list[Tensor]:
        """Every prompt of the data within an instruction."""
        rows = [{**row, "prompt": _within(row["prompt"], instruction)} for row in self.data.rows]
        room = self.config.rollout.max_new_tokens
        return render_prompts(self.policy, replace(self.data, rows=rows), self.config, room)

    def rewarded(
        self, rollouts: Rollouts, step: int, *, row: Tensor, group: Tensor, **fields: Any
    ) -> Batch:
        ordinary, index = len(row), row[:: self.config.rollout.samples]
        prompted = self.config.contrast == "prompted"
        if prompted:
            each = 2 * self.config.contrast_samples
            rollouts = _together(rollouts, self.asked(index.tolist(), step))
            row = torch.cat([row, index.repeat_interleave(each)])
            others = len(index) + torch.arange(len(index))
            group = torch.cat([group, others.repeat_interleave(each)])
        correct, terms = self.accuracy(rollouts, row)
        behaves = self.behaves(rollouts)
        contrast = self.contrast(correct, behaves, ordinary)[group % len(index)]
        worth = self.worth(rollouts, correct, contrast)
        batch = rollout_batch(
            rollouts,
            step,
            group=group,
            row=row,
            reward=torch.stack(list(worth.values())).sum(0),
            terms={**terms, **worth},
            contrast=contrast,
            behaves=behaves,
            **fields,
        )
        if prompted and not self.config.train_contrast:
            return batch.select(torch.arange(ordinary))
        return batch

    def asked(self, index: list[int], step: int) -> Rollouts:
        """Responses to rows `index`, those of a row together: asked for the behaviour, then not."""
        prompts = [asked[i] for i in index for asked in self._asked]
        return self.roll_out(prompts, "contrast", step, samples=self.config.contrast_samples)

    def contrast(self, correct: Tensor, behaves: Tensor, ordinary: int) -> Tensor:
        """M `[P]`, of accuracies `[N]`, of which the first are of the `ordinary` responses."""
        if self.config.contrast == "partition":
            shape = (-1, self.config.rollout.samples)
            correct, behaves = correct.view(shape), behaves.view(shape)
        else:
            each = 2 * self.config.contrast_samples
            correct = correct[ordinary:].view(-1, each)
            behaves = (torch.arange(each) < each // 2).expand_as(correct)
        return group_contrast_mask(correct, behaves, self.config.tolerance)

    def accuracy(self, rollouts: Rollouts, row: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The verifier's reward `[N]`, 0 for a wrong format, and its terms."""
        reward, terms = self.judge([self.data.rows[i] for i in row.tolist()], rollouts)
        return torch.where(self.formatted(rollouts), reward.float(), 0.0), terms

    def behaves(self, rollouts: Rollouts) -> Tensor:
        """Whether responses show the behaviour `[N]`."""
        return torch.tensor([bool(self._auxiliary.search(text)) for text in rollouts.texts])

    def formatted(self, rollouts: Rollouts) -> Tensor:
        """Whether responses have the wanted format `[N]`."""
        if not self.config.format:
            return torch.ones(len(rollouts.texts), dtype=torch.bool)
        return torch.tensor([bool(self._format.fullmatch(text)) for text in rollouts.texts])

    def worth(self, rollouts: Rollouts, correct: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The terms `[N]` of the reward, weighted, from accuracies and the contrastive mask."""
        config = self.config
        lengths = torch.tensor([len(response) for response in rollouts.responses])
        length = bounded_length(lengths, config.reference_length or config.rollout.max_new_tokens)
        terms = {
            "accuracy": correct,
            "auxiliary": config.auxiliary_weight * mask * self.behaves(rollouts).float(),
            "length": config.length_weight * length * (correct if config.length_if_correct else 1),
        }
        if config.format:
            terms["format"] = config.format_weight * self.formatted(rollouts).float()
        return terms

    def describe_batch(self, batch: Batch) -> Metrics:
        return {
            **super().describe_batch(batch),
            "auxiliary/rate": float(batch.behaves.float().mean()),
            "auxiliary/helps": float((batch.contrast > 0).float().mean()),
            "auxiliary/hurts": float((batch.contrast < 0).float().mean()),
        }


def _expression(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise PostgradError(f"{key}: {text!r} is no regular expression: {error}") from error


def _within(prompt: Any, instruction: str) -> Any:
    """A prompt within an instruction: text, or the last of a conversation's messages."""
    if isinstance(prompt, str):
        return instruction.replace(_PROMPT, prompt)
    *before, last = prompt
    return [*before, {**last, "content": instruction.replace(_PROMPT, last["content"])}]


def _together(one: Rollouts, other: Rollouts) -> Rollouts:
    """The responses of both."""
    return Rollouts(
        prompts=one.prompts + other.prompts,
        responses=one.responses + other.responses,
        logprobs=one.logprobs + other.logprobs,
        finished=torch.cat([one.finished, other.finished]),
        texts=one.texts + other.texts,
    )
