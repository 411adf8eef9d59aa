"""GRACE on the tiny model: what its advantages are made of, a run from start to embeddings."""

import pytest
import torch
from sentence_transformers import SentenceTransformer

from language_runs import SMALL, assert_same_run, moved, write_rows
from postgrad.advantages.group import group_mean_centred
from postgrad.api import resume, train
from postgrad.config import resolve
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.representation.grace import Grace
from postgrad.objectives.policy_gradient import clipped_surrogate
from postgrad.rewards.contrastive import contrastive_rationale_reward
from postgrad.training.record import METRICS, SAMPLES, read_rows

TRIPLES = [
    {"anchor": f"find {a}", "positive": f"def {b}(): {a}", "negative": f"def {c}()"}
    for a, b, c in zip("bcdfghjk", "rmvnsptq", "mrnvpsqt", strict=True)
]
SHORT = {
    "rollout": {"samples": 4, "max_new_tokens": 5},
    "batch_size": 4,
    "instruction": "Say:",
    "precision": "fp32",
}


def made(data=None, **settings):
    _, own = resolve(Grace.Config, Grace.recipe, {"model": "tiny", **SHORT, **settings})
    return Grace(own, Place(seed=1), data=data or TRIPLES)


def advantages(**settings):
    return made(**settings).collect(0).advantages


def run(folder, **settings):
    given = {**SMALL, **SHORT, "data": TRIPLES, "steps": 2, **settings}
    return train("grace", output=str(folder), **given)


# Advantages -------------------------------------------------------------------------------------


def test_the_papers_negatives_change_rewards_but_no_advantage():
    paper = {"negatives": "paper", "negative_weight": 1.0, "hard_negatives": 0.2}
    with_negatives = made(**paper).collect(0)
    without = made(negatives="paper", negative_weight=0.0, hard_negatives=0.0).collect(0)
    assert (with_negatives.reward - without.reward).abs().max() > 0.1
    torch.testing.assert_close(with_negatives.advantages, without.advantages, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", [{"hard_negatives": 0.5}, {"negative_weight": 1.0}])
def test_negatives_per_rollout_change_the_advantages(changed):
    assert (advantages() - advantages(**changed)).abs().max() > 1e-4


def test_advantages_are_centred_in_each_group_and_not_scaled():
    batch = made().collect(0)
    groups = batch.advantages.view(4, 4)
    torch.testing.assert_close(groups.sum(1), torch.zeros(4), atol=1e-4, rtol=0)
    rewards = batch.reward.view(4, 4)
    torch.testing.assert_close(groups, rewards - rewards.mean(1, keepdim=True))
    torch.testing.assert_close(
        advantages(reward_temperature=0.05), 2 * batch.advantages, atol=1e-4, rtol=0
    )


def test_rationales_that_are_all_alike_teach_nothing():
    almost_greedy = {"samples": 4, "max_new_tokens": 5, "temperature": 1e-4}
    method = made(rollout=almost_greedy)
    batch = method.collect(0)
    assert len({tuple(response.tolist()) for response in batch.responses[:4]}) == 1
    torch.testing.assert_close(batch.advantages, torch.zeros(16), atol=1e-4, rtol=0)


def test_cut_rationales_can_be_given_a_fixed_reward():
    batch = made(truncation_reward=-1.0).collect(0)
    cut = ~batch.finished
    assert cut.any()
    assert (batch.reward[cut] == -1).all()
    assert (made().collect(0).reward[cut] != -1).all()


def test_without_labels_a_text_is_its_own_query():
    texts = [{"text": row["positive"]} for row in TRIPLES]
    batch = made(texts, mode="unsupervised", hard_negatives=0.2).collect(0)
    fields = batch.fields()
    parts = fields["reward/self"] + 0.2 * (fields["reward/consistency"] + fields["reward/cross"])
    torch.testing.assert_close(batch.reward, parts / 0.1, atol=1e-4, rtol=1e-4)


def test_the_encoder_is_the_policy_itself():
    method = made()
    before = method.embed(["find b"])
    assert (moved(method, 0.1).embed(["find b"]) - before).abs().max() > 1e-3
    assert not before.requires_grad


def test_the_estimated_gradient_is_the_exact_one():
    """Rationales of one token with fixed embeddings: everything can be enumerated."""
    random = torch.Generator().manual_seed(0)
    queries, table = (torch.randn(n, 4, generator=random) for n in (3, 6))
    weights = torch.randn(3, 6, generator=random, requires_grad=True)
    options = {"consistency": 0.0, "hard_negatives": 1.0, "negatives": "per_rollout"}

    def rewards(choices):
        return contrastive_rationale_reward(queries, table[choices], None, **options)[0]

    every = rewards(torch.arange(6).expand(3, 6))
    value = (weights.softmax(-1) * every).sum()
    (exact,) = torch.autograd.grad(value, weights)
    estimates = []
    for _ in range(40):
        chosen = torch.multinomial(weights.softmax(-1), 1000, replacement=True, generator=random)
        group = torch.arange(3).repeat_interleave(1000)
        advantages = group_mean_centred(rewards(chosen).flatten(), group)
        logprobs = weights.log_softmax(-1).gather(1, chosen).flatten()
        ratio = (logprobs - logprobs.detach()).exp()
        loss = clipped_surrogate(ratio, advantages, 0.2, 0.2).sum() / 1000
        estimates.append(-torch.autograd.grad(loss, weights)[0])
    estimate = torch.stack(estimates)
    error = estimate.std(0) / 40**0.5
    assert error.max() < 0.05 * exact.abs().max()
    assert ((estimate.mean(0) - exact).abs() < 4 * error).all()


# Runs -------------------------------------------------------------------------------------------


def test_a_run_shows_retrieval_without_rationale_before_and_after(tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", TRIPLES)
    done = run(tmp_path / "run", eval_data=pairs, eval_size=6)
    first, *_, last = [row for row in read_rows(done.folder / METRICS) if "evaluation/mrr" in row]
    assert first["step"] == 0
    assert 0 < first["evaluation/without_rationale/mrr"] <= 1
    assert last["step"] == 2
    assert "evaluation/without_rationale/mrr" not in last
    row = [row for row in read_rows(done.folder / SAMPLES) if "rationale_before" in row][-1]
    assert row["text"] in {text for triple in TRIPLES for text in triple.values()}
    assert row["rationale_before"] in done.method.first_rationales
    assert row["rationale_after"] in done.method.last_rationales


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "triples.jsonl", TRIPLES)
    settings = {"data": data, "eval_data": data, "negative_weight": 1.0, "minibatches": 2}
    run(tmp_path / "whole", steps=4, **settings)
    run(tmp_path / "parts", steps=2, **settings)
    resumed = resume(tmp_path / "parts", steps=4, allow_changes=True)
    # the interrupted run also evaluated at its own end
    rows = read_rows(tmp_path / "parts" / METRICS)
    assert resumed.method.first_rationales
    assert [r["evaluation/mrr"] for r in rows if "evaluation/mrr" in r][-1] == (
        resumed.evaluation["mrr"]
    )
    run(tmp_path / "same", steps=4, evaluate_every=2, **settings)
    assert_same_run(tmp_path / "same", tmp_path / "parts")


def test_the_saved_model_embeds_in_sentence_transformers(tmp_path):
    done = run(tmp_path / "run")
    texts = ["find b", "def r(): b"]
    model = SentenceTransformer(str(done.folder / "model"), device="cpu")
    found = model.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, done.method.embed(texts, rationale=False), atol=1e-4, rtol=0)


# Faults -----------------------------------------------------------------------------------------

PAIRS = [{"anchor": row["anchor"], "positive": row["positive"]} for row in TRIPLES]
FAULTS = {
    "one rationale": ({"rollout": {"samples": 1}}, "rollout.samples: .* at least 2, got 1"),
    "one text": ({"batch_size": 1}, "batch_size: .* at least 2, got 1"),
    "no tau": ({"reward_temperature": 0.0}, "reward_temperature"),
    "no negatives": ({"data": PAIRS, "negative_weight": 1.0}, "negative"),
    "no texts": ({"data": PAIRS, "mode": "unsupervised"}, "text"),
    "long texts": ({"max_text_tokens": 10**6}, "max_text_tokens: 1000000 do not fit"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_found_before_anything_is_written(tmp_path, case):
    settings, message = FAULTS[case]
    with pytest.raises(PostgradError, match=message) as caught:
        run(tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
