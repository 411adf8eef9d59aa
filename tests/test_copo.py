"""COPO: entropy of answers, the gate and the two advantages by hand; the blend on real rollouts."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.advantages.consistency import (
    answer_entropy,
    consistency,
    entropy_gate,
    global_advantage,
    local_weight,
)
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.copo import COPO
from postgrad.methods.language.verifiable.grpo import GRPO
from postgrad.objectives.policy_gradient import clipped_surrogate, importance_ratio
from postgrad.rewards.verifiers import final_answer
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
MODES = (
    "only-soft",
    "soft-with-forced",
    "only-forced",
    "soft-with-zero",
    "only-zero",
    "only-global",
    "no-global",
)


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def first_letter(completions):
    """0 or 1, so that some groups agree: all responses to the first prompt are wrong."""
    return [float(text[:1].isalpha() and i >= 4) for i, text in enumerate(completions)]


def copo(**settings):
    return {"name": "copo", "answer": "text", **settings}


def made(kind=COPO, reward=first_letter, advantage=None, **config):
    settings = {"model": "tiny", **SHORT, "advantage": advantage or copo(), **config}
    return kind(validated(kind.Config, settings), Place(), data=ROWS, reward=reward)


# Pure functions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "entropy", "gate", "early", "coefficient"),
    [
        ("aaaaaa", 0, 9.35762e-14, 4.53979e-05, 1),
        ("aaaaab", 0.650022, 4.14179e-08, 0.952594, 0.790448),
        ("aaaabb", 0.918296, 8.85886e-06, 0.999767, 0.703962),
        ("aaabbb", 1, 4.53979e-05, 0.999955, 0.677623),
        ("aabbcc", 1.584963, 0.845437, 1.000000, 0.489044),
        ("aabbcd", 1.918296, 0.999767, 1, 0.381585),
        ("abcdef", 2.584963, 1, 1, 0.166667),
    ],
)
def test_the_worked_entropies_gates_and_coefficients(answers, entropy, gate, early, coefficient):
    found = answer_entropy(answers, torch.zeros(6).long())
    assert found.item() == pytest.approx(entropy, abs=1e-6)
    exact = answer_entropy(answers, torch.zeros(6).long()).double()
    assert entropy_gate(exact, 20, 1.5).item() == pytest.approx(gate, rel=1e-5)
    assert entropy_gate(exact, 20, 0.5).item() == pytest.approx(early, rel=1e-5)
    assert consistency(found, 6).item() == pytest.approx(coefficient, abs=1e-6)


def test_the_worked_global_advantages():
    found = global_advantage(torch.tensor([1, 0.5, 0, 1 / 6]))
    expected = torch.tensor([1.322873, 0.188982, -0.944909, -0.566945])
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
    groups = torch.arange(4).repeat_interleave(6)
    entropy = answer_entropy("aaaaaaaaabcdabcdefaabcde", groups)
    rewards = torch.tensor([1, 0.5, 0, 1 / 6]) * consistency(entropy, 6)
    torch.testing.assert_close(rewards, torch.tensor([1, 0.211072, 0, 0.045688]), atol=1e-6, rtol=0)
    expected = torch.tensor([1.471343, -0.221230, -0.674066, -0.576047])
    torch.testing.assert_close(global_advantage(rewards), expected, atol=4e-6, rtol=0)


def test_entropy_does_not_depend_on_names_or_order_and_none_is_one_answer():
    groups = torch.tensor([7, 3, 7, 3, 7, 3])
    one = answer_entropy(["x", "p", "x", "q", "y", "q"], groups)
    other = answer_entropy([1.0, "b", 1.0, None, 2.0, None], groups)
    assert one.equal(other)
    assert one[0] == one[1] > 0


def test_prompts_that_are_all_alike_have_no_global_advantage():
    assert global_advantage(torch.full((5,), 0.3)).eq(0).all()
    assert global_advantage(torch.rand(9)).sum().item() == pytest.approx(0, abs=1e-5)


def test_the_modes_by_hand():
    gate = torch.tensor([0.9, 0.9, 0.2, 0.2])
    local = torch.tensor([1.0, -1.0, 0.0, 0.0])
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = {
        "only-soft": [0.9, 0.9, 0.2, 0.2],
        "soft-with-forced": [0.9, 0.9, 0, 0],
        "only-forced": [1, 1, 0, 0],
        "soft-with-zero": [0.9, 0, 0.2, 0.2],
        "only-zero": [1, 0, 1, 1],
        "only-global": [0, 0, 0, 0],
        "no-global": [1, 1, 1, 1],
    }
    assert set(expected) == set(MODES)
    for mode, weights in expected.items():
        assert local_weight(mode, gate, local, rewards).tolist() == pytest.approx(weights)


def test_final_answers():
    text = "so 3 <answer> 7 </answer>"
    assert final_answer(text, "number") == 7.0
    assert final_answer(text, "tagged") == "7"
    assert final_answer(" 0110", "text") == "0110"
    assert final_answer("none", "number") is final_answer(" ", "text") is None
    assert final_answer("<answer></answer>", "tagged") is None


def test_wrong_calls_are_refused():
    four = torch.zeros(4)
    for call, message in (
        (lambda: answer_entropy("abc", four.long()), "3 answers"),
        (lambda: entropy_gate(four, 0, 1.5), "k must be above 0"),
        (lambda: consistency(four, 1), "at least 2 samples"),
        (lambda: global_advantage(four[:1]), "at least 2 prompts"),
        (lambda: local_weight("only-soft", four, four[:2], four), r"must be \[N\]"),
        (lambda: local_weight("soft", four, four, four), "unknown mode 'soft'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The method ----------------------------------------------------------------------------------


def gradient_of(method, change=False):
    batch = method.collect(0)
    if change:
        moved(method, 0.05)
    loss, _ = method.loss(batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in method.policy.parameters()]), loss.item()


@pytest.mark.parametrize("settings", [{"mode": "no-global"}, {"b": -10.0}])
def test_without_the_global_part_it_is_grpo(settings):
    grpo = made(
        GRPO,
        advantage={"name": "standardised", "eps": 1e-6},
        mask={"name": "ppo", "dual_clip": 3.0},
        minibatches=2,
    )
    ours = gradient_of(made(advantage=copo(**settings), minibatches=2), change=True)
    for one, other in zip(ours, gradient_of(grpo, change=True), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_on_the_samplers_policy_the_blend_is_one_advantage():
    # a gate that is neither open nor shut
    advantage = copo(k=1.0, answer="number", mode="soft-with-forced")
    method = made(advantage=advantage)
    batch = method.collect(0)
    weights = batch.local_weight
    assert bool(((weights > 0.01) & (weights < 0.99)).any())
    blended = weights * batch.local_advantages + (1 - weights) * batch.global_advantages
    assert blended.equal(batch.advantages)
    method.loss(batch)[0].backward()
    ours = [p.grad.clone() for p in method.policy.parameters()]
    method.policy.zero_grad()
    losses, _ = method.estimator.token_losses(batch, method._score(batch))
    method.aggregated(losses, batch, method._score(batch)).backward()
    for one, parameter in zip(ours, method.policy.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-7, rtol=1e-4)


def test_where_the_policy_has_moved_two_clipped_losses_are_blended():
    advantage = copo(k=1.0, answer="number", global_coefficient=0.5)
    method = made(advantage=advantage, minibatches=2)
    batch = method.collect(0)
    moved(method, 0.05)
    with torch.no_grad():
        scores = method._score(batch)
        losses, metrics = method.token_losses(batch, scores)
        one_loss, _ = method.estimator.token_losses(batch, scores)
    assert metrics["ratio/clipped"] > 0
    ratio = importance_ratio(scores.logprobs, batch.old_logprobs, scores.mask)

    def clipped(advantages):
        return clipped_surrogate(ratio, advantages[:, None].expand_as(ratio), 0.2, 0.2, 3.0)

    w = batch.local_weight[:, None]
    expected = w * clipped(batch.local_advantages) + 0.5 * (1 - w) * clipped(
        batch.global_advantages
    )
    torch.testing.assert_close(losses, expected)
    assert not torch.allclose(losses[scores.mask], one_loss[scores.mask], atol=1e-3)


def test_global_advantages_are_those_of_the_whole_batch_in_every_minibatch():
    method = made(minibatches=2)
    batch = method.collect(0)
    assert len(batch.global_advantages.unique()) > 1
    for part in method.minibatches(batch):
        for i, group in enumerate(part.group.tolist()):
            whole = batch.global_advantages[batch.group == group]
            assert bool((whole == part.global_advantages[i]).all())


def test_a_group_that_is_all_wrong_teaches_where_its_answers_agree_or_when_forced():
    """The gate for the same answers, to which all differ or all agree."""
    for mode, b, taught in (
        ("only-soft", 10.0, True),
        ("only-soft", -10.0, False),
        ("soft-with-forced", -10.0, True),
    ):
        batch = made(advantage=copo(mode=mode, b=b)).collect(0)
        assert bool((batch.reward[batch.group == 0] == 0).all())
        first = batch.advantages[batch.group == 0]
        assert bool((first < -1e-3).all()) == taught
        assert bool((first == 0).all()) != taught


def test_rewards_structured_by_agreement():
    batch = made(advantage=copo(structured=True)).collect(0)
    entropy = answer_entropy([text.strip() for text in batch.texts], batch.group)
    means = torch.stack([batch.reward[batch.group == g].mean() for g in range(4)])
    expected = global_advantage(means * consistency(entropy, 4))[batch.group]
    torch.testing.assert_close(batch.global_advantages, expected)


def test_the_gate_opens_at_the_papers_share_of_the_largest_entropy():
    """1.5 bits in groups of 6; in groups of 4 the same share of 2 bits."""
    batch = made().collect(0)
    given = made(advantage=copo(b=1.5 * 2 / 2.584963)).collect(0)
    torch.testing.assert_close(batch.local_weight, given.local_weight, atol=1e-5, rtol=1e-4)
    assert validated(COPO.Config, {}).rollout.samples == 6


def test_another_advantage_is_used_alone():
    method = made(advantage="centred")
    batch = method.collect(0)
    assert "local_weight" not in batch
    assert bool(torch.isfinite(method.loss(batch)[0]))


def test_it_learns_and_counts_what_teaches(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 5e-3, "advantage": copo()}
    settings["rollout"] = {"samples": 8, "max_new_tokens": 4}
    train("copo", data=ROWS, reward=letters, steps=30, output=tmp_path / "run", **settings)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    rewards = torch.tensor([row["reward"] for row in rows])
    first, last = rewards[:8], rewards[-8:]
    noise = float((first.var() / 8 + last.var() / 8).sqrt())
    assert float(last.mean() - first.mean()) > max(0.2, 4 * noise)
    assert 0 < rows[0]["answers/entropy"] <= 3
    assert rows[0]["advantage/used"] > 0.5


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes("copo", tmp_path, data=data, reward="numeric", minibatches=2, **SMALL, **SHORT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"samples": 1}}, "rollout.samples: agreement of answers .* at least 2"),
        ({"batch_size": 1}, "batch_size: prompts are compared .* at least 2, got 1"),
        ({"advantage": {"k": 0}}, "advantage.k: .*greater than 0"),
        ({"advantage": {"mode": "soft"}}, "advantage.mode: .*only-soft"),
        ({"advantage": {"answer": "boxed"}}, "advantage.answer: .*number"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_loaded(settings, message, tmp_path):
    given = {**SMALL, **SHORT, "data": ROWS, "reward": letters, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("copo", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
