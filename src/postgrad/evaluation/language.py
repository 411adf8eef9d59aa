"""What a language model is worth on a task, measured as the task's format allows."""

import torch

from postgrad.errors import PostgradError
from postgrad.evaluation.retrieval import retrieval_metrics
from postgrad.models.language import LanguagePolicy
from postgrad.rewards import load_rewards
from postgrad.rewards.learned import LearnedReward
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.tasks import Examples

SIDES = ("chosen", "rejected")


@torch.no_grad()
def evaluate_policy(
    policy: LanguagePolicy, examples: Examples, max_new_tokens: int = 256
) -> dict[str, float]:
    """Metrics of `policy` on `examples`; which ones follows from their format.

    prompts with a verifier: mean reward of greedy answers; triples and pairs: retrieval of the
    positive by mean-pooled embeddings; preferences: share of chosen responses that are likelier
    than the rejected one, by sum and by mean of token log-probabilities; demonstrations and text:
    mean next-token loss in nats.
    """
    if examples.format in ("triples", "pairs"):
        rows = examples.rows
        sides = [[row[side] for row in rows] for side in ("anchor", "positive")]
        return retrieval_metrics(*(_pooled(policy, texts) for texts in sides))
    if examples.format == "preferences":
        return _preference_accuracy(policy, examples)
    if examples.format == "prompts" and examples.verifier is not None:
        return _mean_reward(policy, examples, max_new_tokens)
    if examples.format in ("demonstrations", "text"):
        return {"loss": next_token_loss(policy, examples)}
    raise PostgradError(
        f"{examples.name} has format {examples.format!r} and no verifier: nothing to measure"
    )


def evaluate_reward(reward: LearnedReward, examples: Examples) -> dict[str, float]:
    """How often, and by how much, a learnt reward prefers the chosen response of pairs."""
    pairs = examples.require("preferences").rows
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = (reward(prompts, [row[side] for row in pairs]) for side in SIDES)
    gaps = [one - other for one, other in zip(chosen, rejected, strict=True)]
    right = [0.5 * (1 + (gap > 0) - (gap < 0)) for gap in gaps]
    return {"accuracy": sum(right) / len(right), "margin": sum(gaps) / len(gaps)}


def next_token_loss(policy: LanguagePolicy, examples: Examples, max_tokens: int = 512) -> float:
    """Mean negative log-likelihood of responses (or whole texts) in nats per token."""
    prompts, responses = [], []
    for row in examples.rows:
        if examples.format == "text":
            ids = policy.encode_response(row["text"], end=False)[:max_tokens]
            prompts.append(ids[:1])
            responses.append(ids[1:])
        else:
            prompts.append(_prompt(policy, examples, row))
            responses.append(policy.encode_response(row["completion"])[:max_tokens])
    total, tokens = 0.0, 0
    for start in range(0, len(prompts), 16):
        scores = policy.score(prompts[start : start + 16], responses[start : start + 16])
        total -= float(scores.logprobs[scores.mask].sum())
        tokens += int(scores.mask.sum())
    return total / tokens


def _prompt(policy: LanguagePolicy, examples: Examples, row: dict) -> torch.Tensor:
    prompt = row["prompt"]
    if examples.chat and policy.has_chat_template and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return policy.render(prompt)


def _pooled(policy: LanguagePolicy, texts: list[str]) -> torch.Tensor:
    ids = [policy.encode_response(text, end=False)[:512] for text in texts]
    nothing = [torch.empty(0, dtype=torch.long)] * len(ids)
    return policy.embed(ids, nothing).float()


def _preference_accuracy(policy: LanguagePolicy, examples: Examples) -> dict[str, float]:
    right_sum = right_mean = 0
    for row in examples.rows:
        prompt = _prompt(policy, examples, row)
        responses = [policy.encode_response(row[side]) for side in SIDES]
        scores = policy.score([prompt, prompt], responses)
        sums = scores.logprobs.sum(1)
        means = sums / scores.mask.sum(1)
        right_sum += int(sums[0] > sums[1])
        right_mean += int(means[0] > means[1])
    count = len(examples.rows)
    return {"accuracy": right_sum / count, "accuracy_per_token": right_mean / count}


def _mean_reward(
    policy: LanguagePolicy, examples: Examples, max_new_tokens: int
) -> dict[str, float]:
    rows = examples.rows
    prompts = [_prompt(policy, examples, row) for row in rows]
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0)
    texts = generate(policy, prompts, settings, seeds=[0] * len(prompts)).texts
    assert examples.verifier is not None
    total, _ = load_rewards(examples.verifier).of_rows(rows, texts)
    return {"reward": sum(total) / len(total)}
