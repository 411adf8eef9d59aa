"""DSP: a small policy writes what a frozen language model needs to hear."""

import copy
import string
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Optimise, Place
from postgrad.methods.language.base import Given, RolloutSettings, draw_responses
from postgrad.methods.language.rewarded import TaskReward
from postgrad.methods.language.rlhf.actor_critic import ActorCritic, ActorCriticSettings
from postgrad.models.language import LanguagePolicy
from postgrad.rewards import RewardSet
from postgrad.rewards.functions import columns_of
from postgrad.rewards.overlap import keyword_rewards
from postgrad.rewards.running import attempt
from postgrad.sampling.chat import ChatModel, ChatSettings, load_chat
from postgrad.sampling.generation import Rollouts
from postgrad.sampling.mixture import ActionMask

STIMULUS = "stimulus"
_SUMMARIES = "official code, summarisation"


class DSPSettings(ActorCriticSettings):
    """Settings of directional stimulus prompting."""

    black_box: ChatSettings = setting(ChatSettings(), "the frozen language model that is helped")
    template: str = setting(
        "{prompt}\n\nHint: {stimulus}",
        "what the black box is asked: {stimulus}, and columns of the data such as {prompt}",
    )
    answers: int = setting(4, "K: answers a stimulus", gt=0, source="official code")
    answer_tokens: int = setting(160, "longest answer in tokens", gt=0, source=_SUMMARIES)
    answer_temperature: float = setting(
        0.7, "at which the black box is sampled; 0: greedily, once", ge=0, source="official code"
    )
    answer_stop: list[str] = setting([], "strings before which an answer ends")
    answer_scale: float = setting(
        10.0, "c_LLM: the mean reward of the answers times this is the stimulus's", ge=0,
        source="official code",
    )  # fmt: skip
    empty_limit: float = setting(
        0.5, "share of empty answers, each worth 0, beyond which the run stops", ge=0, le=1
    )
    step_reward: float = setting(
        1.0, "weight of the rewards of single keywords; 0: none", ge=0, source=_SUMMARIES
    )
    delimiter: str = setting(";", "what ends a keyword", min_length=1, source=_SUMMARIES)
    reference: str = setting("answer", "column with the text in which keywords should occur")
    miss_penalty: float = setting(0.2, "of a keyword that does not", ge=0, source=_SUMMARIES)
    stop_words: list[str] = setting([], "words that are no keywords")
    whole_words: bool = setting(
        True, "keywords occur as whole words; the authors' code takes parts of words too"
    )
    top_mask: float = setting(
        0.9, "NLPO: draw from the nucleus of this mass of a lagged copy of the policy; 1: PPO",
        gt=0, le=1, source="official code",
    )  # fmt: skip
    least_tokens: int = setting(
        100, "NLPO: at least so many tokens may be drawn", gt=0, source=_SUMMARIES
    )
    mask_every: int = setting(20, "NLPO: steps between copies", gt=0, source="official code")
    reward_time_limit: float = setting(
        3600.0, "seconds that black box and reward may take over one batch", gt=0
    )
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=1, max_new_tokens=80, top_k=100), "how stimuli are sampled"
    )
    batch_size: int = setting(64, "prompts a step", gt=0)
    epochs: int = setting(5, "passes over the rollouts of a step", gt=0, source="official code")
    minibatches: int = setting(8, "optimiser steps a pass", gt=0)
    discount: float = setting(0.99, "gamma (uncertain)", gt=0, le=1, source="RL4LMs")
    kl_coefficient: float = setting(
        0.005, "of the KL to the reference, in each token's reward", ge=0, source=_SUMMARIES
    )
    kl_target: float | None = setting(
        0.5, "KL in nats a TOKEN that the coefficient is steered to; if empty it is fixed", gt=0,
        source=_SUMMARIES,
    )  # fmt: skip


class DSP(ActorCritic):
    """Directional stimulus prompting (Li et al. 2023, arXiv 2302.11520).

    A large model cannot be tuned, but what it is asked can: a small policy reads the input x and
    writes a stimulus z for it, such as keywords of a summary. Black box, prompt and metric are the
    environment; no gradient passes them.

        max E[s(x, y)],   z ~ pi(z|x),  y ~ p_LLM(y|x, z)

        r_t = [t last] c_LLM mean_k s(x, y_k) + [z_t ends a keyword] step_reward (+1 | -0.2)
              - beta log(pi_old(z_t) / pi_ref(z_t))

    A keyword earns +1 if it occurs in the reference, and costs 0.2 if not, or if it is empty or
    said again; what is not ended by the delimiter earns nothing. beta follows the KL of a token.
    Start from a policy that was fine-tuned on stimuli taken from references (`sft`).

    The reward's functions see the black box's answers as completions. An answer is a function of
    stimulus, sample number and the run's seed, and is asked for once. From Python, `black_box` may
    be anything that is called as a `ChatModel` is.

    The update is NLPO's (Ramamurthy et al. 2022, arXiv 2210.01241), PPO whose actions are drawn
    within the nucleus of a copy of the policy that is renewed every `mask_every` steps. As in the
    authors' code, ratio and KL are of the whole distributions; a ratio of the masked ones needs
    every token's probability in scoring and is not offered. Samples of the masked policy make the
    KL estimate too small, even negative (`top_mask=1` is PPO, without that). Policy and critic are
    two networks. The authors' reward relative to answers without a stimulus, which they leave off,
    is left out.
    """

    Config = DSPSettings
    recipe = {**ActorCritic.recipe, "learning_rate": 2e-6, "steps": 20}
    parts = FourParts(
        mask="PPO's clip",
        denominator="the policy that sampled, without the action mask",
        advantage="GAE of the black box's reward, keywords and KL, standardised over the batch",
        gradient="token log-likelihood ratio",
    )
    config: DSPSettings

    def __init__(
        self,
        config: DSPSettings,
        place: Place,
        *,
        reward: Any = None,
        black_box: ChatModel | None = None,
        **given: Unpack[Given],
    ):
        # evaluations too judge stimuli by the answers to them
        super().__init__(config, place, reward=self.answer_reward, **given)
        self.metric: RewardSet = TaskReward(config, self.data, reward).functions
        self._check_data()
        self.black_box = black_box or load_chat(config.black_box, place.device)
        self._mask = self._find_mask()

    def _check_data(self) -> None:
        row, config = self.data.rows[0], self.config
        try:
            fields = string.Formatter().parse(config.template)
            names = {name for _, name, _, _ in fields if name is not None}
        except ValueError as error:
            raise PostgradError(f"template: {error}: write {{{{ and }}}} for braces") from error
        if STIMULUS not in names:
            raise PostgradError("template: expected {stimulus} in it: the policy is not heard")
        for name in sorted(names - {STIMULUS}):
            if not isinstance(row.get(name), str):
                texts = ", ".join(key for key, value in row.items() if isinstance(value, str))
                raise PostgradError(
                    f"template: {{{name}}} is no column of texts in {self.data.name} (there are: "
                    f"{texts or 'none'})"
                )
        if config.step_reward and config.reference not in row:
            raise PostgradError(
                f"reference: {self.data.name} has no column {config.reference!r} for keywords to "
                "occur in: name another, or set step_reward to 0"
            )

    def _find_mask(self) -> ActionMask | None:
        config = self.config
        if config.top_mask == 1:
            return None
        network = copy.deepcopy(self.policy.network).requires_grad_(False)
        lagged = LanguagePolicy(network, self.policy.tokenizer)
        return ActionMask(lagged, config.top_mask, config.least_tokens, self.policy.end_tokens)

    # What a stimulus is worth ------------------------------------------------------------------

    def judge(
        self, rows: list[dict[str, Any]], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self._answered(rows, rollouts.texts)
        return self.config.answer_scale * terms["answer"], terms

    def answer_reward(
        self, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> list[float]:
        """The mean reward of the answers to each stimulus, as a reward function."""
        columns = {"prompt": prompts, **columns}
        rows = [
            {name: values[i] for name, values in columns.items()} for i in range(len(completions))
        ]
        return self._answered(rows, completions)["answer"].tolist()

    def _answered(self, rows: list[dict[str, Any]], stimuli: list[str]) -> dict[str, Tensor]:
        """Of the answers to N stimuli the mean reward, its terms, and the share of empty ones."""
        config, k = self.config, self.config.answers
        asked = [
            config.template.format_map({**row, STIMULUS: stimulus})
            for row, stimulus in zip(rows, stimuli, strict=True)
        ]
        ask = partial(
            self.black_box,
            asked,
            k,
            max_tokens=config.answer_tokens,
            temperature=config.answer_temperature,
            stop=config.answer_stop,
            seed=self.place.seed,
        )
        several = attempt(ask, "black_box")
        if [len(texts) for texts in several] != [k] * len(rows):
            raise PostgradError(f"black_box: expected {k} answers to each of {len(rows)} prompts")
        texts = [text for texts in several for text in texts]
        given = [i for i, text in enumerate(texts) if text.strip()]
        empty = 1 - len(given) / len(texts)
        if empty > config.empty_limit:
            raise PostgradError(
                f"black_box: {len(texts) - len(given)} of {len(texts)} answers are empty, more "
                f"than empty_limit={config.empty_limit:g} of them"
            )
        terms = {"answer": torch.zeros(len(texts))}
        if given:
            of = [rows[i // k] for i in given]
            total, parts = self.metric(
                [row["prompt"] for row in of], [texts[i] for i in given], columns_of(of)
            )
            for name, values in {"answer": total, **parts}.items():
                terms[name] = torch.zeros(len(texts))
                terms[name][given] = torch.tensor(values)
        terms["empty"] = torch.tensor([float(not text.strip()) for text in texts])
        return {name: values.view(len(rows), k).mean(1) for name, values in terms.items()}

    def token_rewards(self, batch: Batch) -> Tensor:
        rewards = super().token_rewards(batch)
        return rewards + self.config.step_reward * batch.step_rewards

    def _step_rewards(self, rows: list[dict[str, Any]], responses: list[Tensor]) -> Tensor:
        """The rewards `[N, T]` of the tokens that end a keyword; 0 elsewhere."""
        rewards = torch.zeros(len(responses), max(len(tokens) for tokens in responses))
        if self.config.step_reward == 0:
            return rewards
        for i, (row, tokens) in enumerate(zip(rows, responses, strict=True)):
            ended = self._keywords(tokens)
            values = keyword_rewards(
                [keyword for _, keyword in ended],
                str(row[self.config.reference]),
                miss=self.config.miss_penalty,
                stop_words=self.config.stop_words,
                whole_words=self.config.whole_words,
            )
            for (place, _), value in zip(ended, values, strict=True):
                rewards[i, place] += value
        return rewards

    def _keywords(self, tokens: Tensor) -> list[tuple[int, str]]:
        """The place of each token that ends a keyword, with the keyword."""
        delimiter, decode = self.config.delimiter, self.policy.decode
        ended: list[tuple[int, str]] = []
        for place in range(len(tokens)):
            if delimiter in decode(tokens[place : place + 1]):
                parts = decode(tokens[: place + 1]).split(delimiter)[len(ended) : -1]
                ended += [(place, keyword) for keyword in parts]
        return ended

    # What differs from PPO besides --------------------------------------------------------------

    def responses(self, index: list[int], step: int) -> tuple[Rollouts, dict[str, Any]]:
        rollout = self.config.rollout
        rollouts = draw_responses(
            self.policy,
            [self.prompts[i] for i in index],
            rollout,
            self.place.seed,
            "rollout",
            step,
            mask=self._mask,
        )
        rows = [self.data.rows[i] for i in index for _ in range(rollout.samples)]
        return rollouts, {"step_rewards": self._step_rewards(rows, rollouts.responses)}

    def divergence(self, batch: Batch) -> float:
        """KL to the reference in nats a token."""
        difference = batch.old_logprobs - batch.reference_logprobs
        return float(difference.sum() / batch.mask.sum())

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        metrics = super().update(batch, optimise)
        if self._mask is not None and (int(batch.step[0]) + 1) % self.config.mask_every == 0:
            self._mask.policy.load_state_dict(self._learnt(), strict=False)
        return metrics

    def _learnt(self) -> dict[str, Tensor]:
        """The policy's trainable weights, which are all that its lagged copy has to follow."""
        named = self.policy.named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}

    def describe_batch(self, batch: Batch) -> Metrics:
        earned = float(batch.step_rewards.sum(1).mean())
        return {**super().describe_batch(batch), "step_rewards": earned}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._mask is not None:
            weights = dict(self._mask.policy.named_parameters())
            state["mask"] = {name: weights[name].detach() for name in self._learnt()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self._mask is not None:
            self._mask.policy.load_state_dict(state["mask"], strict=False)
