"""Text2Grad: critiques of phrases as rewards of tokens."""

from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, NothingToLearn, Place
from postgrad.methods.language.base import Given, RolloutSettings, pad
from postgrad.methods.language.rewarded import require_one
from postgrad.methods.language.rlhf.actor_critic import (
    ActorCritic,
    ActorCriticSettings,
    at_last_token,
)
from postgrad.methods.language.rollouts import rollout_batch
from postgrad.rewards import RewardSpec
from postgrad.rewards.annotations import INSTRUCTION, Annotator
from postgrad.rewards.critiques import load_critique
from postgrad.rewards.spans import Span, fading, token_places, token_scores
from postgrad.sampling.chat import ChatSettings, load_chat
from postgrad.timing import timed

_CODE = "official code, summaries"


class Text2GradSettings(ActorCriticSettings):
    """Text2Grad's settings."""

    batch_size: int = setting(12, "prompts a step", gt=0, source=_CODE)
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=1, max_new_tokens=100, temperature=0.6, top_p=0.9),
        "how the policy is sampled", source=_CODE,
    )  # fmt: skip
    critique: RewardSpec | None = setting(
        None, "what names good and poor spans of a response: module:function or file.py:function"
    )
    annotator: ChatSettings | None = setting(
        None, "language model that writes the critiques, in place of a function"
    )
    instruction: str | None = setting(
        None, "what the annotator is asked, with {prompt} and {response} in it; if empty, for two "
        "good and two poor spans at most",
    )  # fmt: skip
    annotator_tokens: int = setting(512, "longest critique of the annotator", gt=0)
    reward: list[RewardSpec] | RewardSpec | None = setting(
        None, "what evaluations report, not learnt from; if empty, good spans less poor ones"
    )
    reward_time_limit: float = setting(
        600.0, "seconds that the critiques of a step, or a reward call, may take", gt=0
    )
    default_score: float = setting(
        0.0, "of words that no span touches; official code for programs: 1", ge=-1, le=1
    )
    allow_real_scores: bool = setting(False, "take scores of spans other than -1, 0 and 1")
    fewest_critiques: float = setting(
        0.5, "share of a step's critiques that must have succeeded; with fewer it is passed over",
        gt=0, le=1, source="official code",
    )  # fmt: skip
    most_skipped: float = setting(
        0.5, "share of a step's spans that may be missing in their responses before the run stops",
        ge=0, le=1,
    )  # fmt: skip
    fading_length: float | None = setting(
        None, "scores fade to nothing so many tokens behind a response's first one; official code "
        "for summaries: 48; if empty they do not", gt=0
    )  # fmt: skip
    fading_sharpness: float = setting(1.0, "how fast they fade", gt=0, source=_CODE)
    kl_coefficient: float = setting(
        0.2, "of the KL to the reference, in each token's reward; at first", ge=0, source=_CODE
    )
    kl_target: float | None = setting(
        6.0, "KL in nats a response that the coefficient is steered to; if empty it is fixed",
        gt=0, source=_CODE,
    )  # fmt: skip


class Text2Grad(ActorCritic):
    """Text2Grad: reinforcement learning from natural language feedback (Wang et al. 2025,
    arXiv:2505.22338).

    A critique says which phrase of a response is good or poor, and a scalar reward forgets it.
    Here the phrases that a critique quotes are found in the response, and every token of them is
    rewarded where it stands:

        delta_t = 1, -1 or 0: the score of the span that token t is part of
        r_t     = delta_t - beta KL_t
        A, L    = as of PPO with a value head (`ppo-language`), from these r_t

    With gamma = 0 and no value this is the paper's natural-language gradient
    sum_t delta_t grad log pi(y_t); a span of k tokens counts k times. Critiques come from a
    function of the user's (see `postgrad.rewards.critiques`) or from a language model,
    `annotator=…`, whose JSON is read; the paper's own, an 8B model that was fine-tuned on critiques
    of GPT-4o, is such an annotator (`sft` trains one). A response whose critique failed is dropped.

    Deviations: KL_t is by default the log-ratio of the sampled token; `kl_estimate=full` is the
    code's sum over the vocabulary, for a second forward pass of policy and reference. Policy and
    critic are two networks, so the value loss has no weight; ratios are not bounded beyond PPO's
    clip, and no minibatch is dropped for a large mean ratio. The KL controller is
    `ppo-language`'s, faster than TRL's. Tokens are placed in the text by decoding, and only where
    that fails by the code's walk along words. From the first score on, `fading_length` counts
    tokens from 1 (uncertain).
    """

    Config = Text2GradSettings
    parts = FourParts(
        mask="PPO clip: no gradient where the ratio leaves [1 - eps, 1 + eps] on the winning side",
        denominator="the policy that sampled",
        advantage="GAE(gamma, lambda) of the scores of quoted spans, token by token, and a critic",
        gradient="token log-likelihood ratio",
    )
    config: Text2GradSettings

    def __init__(
        self,
        config: Text2GradSettings,
        place: Place,
        *,
        critique: Any = None,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        self.critique = load_critique(
            critique if critique is not None else _named(config, place),
            time_limit=config.reward_time_limit,
            real_scores=config.allow_real_scores,
        )
        if reward is None:
            reward = config.reward or self.critique.balance
        super().__init__(config, place, reward=reward, **given)

    def check(self) -> None:
        self.critique.probe(self.data.rows[0])
        super().check()

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step).tolist()
        rollouts, _ = self.responses(index, step)
        rows, group = self.owners(index)
        with timed("reward"):
            judged = self.critique.of_rows(rows, rollouts.texts)
        kept = [number for number, said in enumerate(judged) if said is not None]
        if len(kept) < self.config.fewest_critiques * len(judged):
            raise NothingToLearn(f"{len(judged) - len(kept)} of {len(judged)} critiques failed")
        spans = [said or [] for said in judged]
        aligned = [
            self.deltas(said, response, text)
            for said, response, text in zip(spans, rollouts.responses, rollouts.texts, strict=True)
        ]
        deltas = pad([scores for scores, _ in aligned])
        if self.config.fading_length is not None:
            weights = fading(deltas, self.config.fading_length, self.config.fading_sharpness)
            deltas = deltas * weights
        batch = rollout_batch(
            rollouts,
            step,
            group=group,
            reward=deltas.sum(1),
            terms={
                "good_tokens": (deltas > 0).sum(1).float(),
                "poor_tokens": (deltas < 0).sum(1).float(),
            },
            deltas=deltas,
            spans=spans,
            skipped=torch.tensor([skipped for _, skipped in aligned]),
            failed=torch.full((len(judged),), 1 - len(kept) / len(judged)),
        ).select(torch.tensor(kept))
        if int(batch.mask.sum()) < 2:
            raise NothingToLearn("one token is left, which has nothing to be compared with")
        self._require_found(batch)
        return self.with_advantages(self.with_known(batch))

    def deltas(self, spans: list[Span], response: Tensor, text: str) -> tuple[Tensor, int]:
        """The score of each token of a response `[L]`, and how many spans are not in its text."""
        places = token_places(
            lambda ids: self.policy.decode(torch.tensor(ids)), response.tolist(), text
        )
        return token_scores(text, spans, places, default=self.config.default_score)

    def _require_found(self, batch: Batch) -> None:
        share = _skipped_share(batch)
        if share > self.config.most_skipped:
            raise PostgradError(
                f"critique: {share:.0%} of the spans are not in the responses that they are said "
                f"to be from, more than most_skipped={self.config.most_skipped:g}"
            )

    def token_rewards(self, batch: Batch) -> Tensor:
        unfinished = (~batch.finished).float()
        missing = at_last_token(-self.config.missing_end_penalty * unfinished, batch.mask)
        return batch.deltas + missing - self.kl_penalty(batch)

    def describe_batch(self, batch: Batch) -> Metrics:
        return {
            **super().describe_batch(batch),
            "critique/failed": float(batch.failed[0]),
            "critique/spans": sum(map(len, batch.spans)) / len(batch),
            "critique/skipped_spans": _skipped_share(batch),
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        rows = super().samples(batch)
        for number, row in enumerate(rows):
            row["critique"] = "\n".join(
                f"{span.score:+g} {_quoted(span, batch.texts[number])}"
                for span in batch.spans[number]
            )
        return rows


def _named(config: Text2GradSettings, place: Place) -> Any:
    """The critique that the settings name: a function, or an annotator."""
    require_one(critique=config.critique, annotator=config.annotator)
    if config.annotator is None:
        return config.critique
    instruction = INSTRUCTION if config.instruction is None else config.instruction
    if "{response}" not in instruction:
        raise PostgradError("instruction: expected a text with {response} in it")
    chat = load_chat(config.annotator, place.device)
    return Annotator(chat, instruction, config.annotator_tokens)


def _skipped_share(batch: Batch) -> float:
    return int(batch.skipped.sum()) / max(sum(map(len, batch.spans)), 1)


def _quoted(span: Span, text: str) -> str:
    return text[slice(*span.place)] if span.place is not None else span.quote
