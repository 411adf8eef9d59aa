"""Supervised fine-tuning."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import Given, LanguageSettings, find_materials, render_prompts
from postgrad.methods.language.frontier import Frontier, FrontierSettings
from postgrad.tasks import Examples

FORMATS = ("demonstrations", "text")


class SFTSettings(LanguageSettings):
    """SFT's settings."""

    data: DataSettings = setting(DataSettings(name="docstrings"), "demonstrations")
    batch_size: int = setting(16, "demonstrations a step", gt=0)
    max_response_tokens: int = setting(512, "longer responses are cut", gt=0)
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


class SFT(Method):
    """Supervised fine-tuning: maximise the likelihood of demonstrated responses.

        L = - sum_{i,t} log pi(y_it | x_i, y_i<t) / number of response tokens in the batch

    Prompt tokens carry no loss; of a plain text all tokens but the first do. The baseline of every
    method that learns from demonstrations, and the warm-up of those that learn from rewards.
    """

    Config = SFTSettings
    recipe = {
        "precision": "auto",
        "learning_rate": 2e-5,
        "steps": 100,
        "schedule": "cosine",
        "warmup_steps": 5,
    }
    config: SFTSettings

    def __init__(self, config: SFTSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place)
        found = find_materials(config, place, FORMATS, given)
        self.policy, self.order = found.policy, found.order
        self.data = _single_turns(found.data)
        self.items = self._tokenise(self.data)
        self.held_out = None
        if found.held_out is not None:
            held_out = _single_turns(found.held_out)
            found = replace(found, held_out=held_out)
            self.held_out = self._tokenise(held_out)
            if held_out.format == "text" and config.frontier.reward is not None:
                raise PostgradError("frontier.reward: whole texts have no prompts to answer")
        self.frontier = Frontier.of(config, config.frontier, found, place)
        if self.frontier is not None:
            self.policy.freeze_reference()

    def _tokenise(self, examples: Examples) -> Batch:
        limit = self.config.max_response_tokens
        if examples.format == "text":
            texts = [self.policy.encode_response(row["text"])[: limit + 1] for row in examples]
            prompts, responses = [t[:1] for t in texts], [t[1:] for t in texts]
        else:
            prompts = render_prompts(self.policy, examples, self.config, reserve=limit)
            responses = [
                self.policy.encode_response(row["completion"])[:limit] for row in examples.rows
            ]
        lengths = torch.tensor([len(response) for response in responses])
        cost = lengths + torch.tensor([len(prompt) for prompt in prompts])
        return Batch(prompts=prompts, responses=responses, lengths=lengths, cost=cost)

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def collect(self, step: int) -> Batch:
        batch = self.items.select(self.order.indices(step))
        mask = torch.arange(int(batch.lengths.max()))[None, :] < batch.lengths[:, None]
        return batch.with_fields(mask=mask)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        scores = self.policy.score(batch.prompts, batch.responses)
        total = -scores.logprobs[scores.mask].sum()
        return total / batch.tokens, {}

    def evaluate(self) -> Metrics:
        """Mean next-token loss on held-out responses, in nats; reward and KL of fresh samples."""
        if self.held_out is None:
            return {}
        total, tokens = 0.0, 0
        for part in self.held_out.split(16384):
            scores = self.policy.score(part.prompts, part.responses)
            total -= float(scores.logprobs[scores.mask].sum())
            tokens += int(scores.mask.sum())
        metrics = {"loss": total / tokens}
        if self.frontier is not None:
            metrics |= self.frontier.measure(self.policy)
        return metrics

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.policy.decode(batch.prompts[i]),
                "response": self.policy.decode(batch.responses[i]),
            }
            for i in range(min(len(batch), 4))
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def save(self, folder: Path) -> None:
        self.policy.save(folder)


def _single_turns(examples: Examples) -> Examples:
    """Whole conversations as their last turn after all that comes before; the rest as it is."""
    if examples.format == "text" and isinstance(examples.rows[0]["text"], list):
        return examples.require("demonstrations")
    return examples
