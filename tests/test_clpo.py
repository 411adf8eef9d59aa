"""CLPO: difficulty by the present policy, rewrites, the signal filter and the KL by difficulty."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, untimed, write_rows
from postgrad.advantages.group import group_standardised
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import NothingToLearn, Place
from postgrad.methods.language.verifiable.clpo import CLPO
from postgrad.methods.language.verifiable.grpo import GRPO
from postgrad.objectives.policy_gradient import kl_estimate
from postgrad.sampling.difficulty import EASY, HARD, MEDIUM, difficulty, has_signal
from postgrad.sampling.rewriting import extract_rewrite, reveals

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": f"x{i}"} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}


def first_letter(completions):
    return [float(text[:1] in "abcdefghijklmnopqrstuvwxyz") for text in completions]


def spelled(prompts, modes):
    return [f"{mode}: {prompt}" for prompt, mode in zip(prompts, modes, strict=True)]


def made(reward=first_letter, rows=ROWS, rewriter=spelled, kind=CLPO, **config):
    settings = {"model": "tiny", **SHORT, **config}
    more = {"rewriter": rewriter} if kind is CLPO else {}
    return kind(validated(kind.Config, settings), Place(), data=rows, reward=reward, **more)


# The mathematics ---------------------------------------------------------------------------------


def test_labels_with_four_responses():
    labels = difficulty(torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert labels.tolist() == [HARD, HARD, MEDIUM, EASY, EASY]
    gap = difficulty(torch.tensor([0.3, 0.4, 0.5, 0.6]), 0.3, 0.4, 0.5)
    assert gap.tolist() == [HARD, EASY, MEDIUM, EASY]
    with pytest.raises(ValueError, match="0 <= hard <= medium_low"):
        difficulty(torch.tensor([0.5]), 0.5, 0.3, 0.7)


def test_a_signal_is_some_right_and_some_wrong():
    signal = has_signal(torch.tensor([0, 1, 3, 4]), torch.tensor([4, 4, 4, 4]))
    assert signal.tolist() == [False, True, True, False]


def test_the_worked_example():
    rewards = torch.tensor([1.0, 0, 0, 0])
    advantages = group_standardised(rewards, torch.zeros(4, dtype=torch.long), eps=1e-6)
    expected = torch.tensor([1.499997, -0.499999, -0.499999, -0.499999])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    divergence = kl_estimate(
        torch.tensor([[0.2]]), torch.tensor([[0.0]]), torch.ones(1, 1).bool(), kind="k3"
    )
    assert divergence.item() == pytest.approx(0.018731, abs=1e-6)
    assert 0.001 * 0.5 * divergence.item() == pytest.approx(9.365377e-06, rel=1e-5)


def test_rewrites_are_read_out_of_what_was_written():
    assert extract_rewrite("Sure:\n```text\nWhat is 1 + 1?\n```\n```\nother one\n```") == (
        "What is 1 + 1?"
    )
    assert extract_rewrite("```What is 1 + 1?```") == "What is 1 + 1?"
    assert extract_rewrite("What is 1 + 1?\n```") == "What is 1 + 1?"
    assert extract_rewrite("short") is None
    assert extract_rewrite("x" * 2001) is None


def test_a_rewrite_reveals_what_the_original_did_not_hold():
    assert reveals("It is 12. What is 5 + 7?", "What is 5 + 7?", "12")
    assert not reveals("What is 112 + 7?", "What is 5 + 7?", "12")
    assert not reveals("What is 12 + 0?", "0 + 12?", "12")


# The method --------------------------------------------------------------------------------------


def test_without_rewriting_and_scales_it_is_grpo_on_groups_with_a_signal():
    plain = dict.fromkeys(("kl_scale_hard", "kl_scale_other"), 1.0)
    method = moved(made(rewrite="none", **plain))
    grpo = moved(
        made(
            kind=GRPO,
            aggregation="token-mean",
            kl_coefficient=0.001,
            advantage={"name": "standardised", "eps": 1e-6},
            mask={"name": "ppo", "dual_clip": 3.0},
        )
    )
    batch, every = method.collect(0), grpo.collect(0)
    kept = every.select(torch.isin(every.group, batch.group).nonzero().squeeze(1))
    assert 0 < len(kept) < len(every)
    assert batch.texts == kept.texts
    torch.testing.assert_close(method.loss(batch)[0], grpo.loss(kept)[0])
    assert all(0 < batch.reward[batch.group == g].mean() < 1 for g in batch.group.unique())


def test_rewrites_are_groups_of_their_own_and_judged_by_the_problems_answer():
    seen = []

    def remembering(prompts, completions, answer):
        seen.append((prompts, answer))
        return first_letter(completions)

    method = made(remembering)
    batch = method.collect(0)
    first, second = seen
    assert len(first[0]) == 16
    assert set(second[0]) <= set(first[0])  # rewards see the problem that was rewritten
    metrics = method.describe_batch(batch)
    assert metrics["rewrite/usable"] == 1.0
    assert metrics["groups"] == len(batch.group.unique())
    own, new = batch.group < 4, batch.group >= 4
    assert bool(new.any())
    for prompt, row, group, hard in zip(
        batch.prompts, batch.row, batch.group, batch.difficulty == HARD, strict=True
    ):
        text = method.policy.decode(prompt)
        if group < 4:
            assert text == ROWS[int(row)]["prompt"]
        else:
            mode = "simplify" if hard else "diversify"
            assert text == f"{mode}: {ROWS[int(row)]['prompt']}"
    for group in batch.group.unique():
        rewards = batch.reward[batch.group == group]
        assert len(rewards) == 4
        assert 0 < rewards.mean() < 1
        torch.testing.assert_close(
            batch.advantages[batch.group == group],
            (rewards - rewards.mean()) / (rewards.std() + 1e-6),
        )
    assert bool((batch.advantages[own] != 0).all())


@pytest.mark.parametrize(("mode", "labels"), [("hard", {HARD}), ("medium", {MEDIUM})])
def test_one_kind_alone_can_be_rewritten(mode, labels):
    method = made(rewrite=mode)
    found = set()
    for step in range(4):
        batch = method.sampled(method.choose(step), step)
        found |= set(batch.difficulty[batch.group >= 4].tolist())
    assert found == labels


def test_the_kl_is_scaled_by_difficulty_and_nothing_else_is():
    losses, divergence = {}, {}
    for scale in (0.0, 0.5, 1.0):
        method = moved(made(kl_coefficient=0.1, kl_scale_hard=scale))
        batch = method.collect(0)
        hard = batch.difficulty == HARD
        assert batch.kl_scale.tolist() == [scale if h else 1.0 for h in hard]
        losses[scale] = method.loss(batch)[0].item()
        scores = method._score(batch)
        per_token = method.divergence(batch, scores).detach()
        divergence[scale] = float(per_token[hard].sum() / batch.mask.sum())
    assert divergence[1.0] > 0
    slope = 0.1 * divergence[1.0]
    assert losses[1.0] - losses[0.0] == pytest.approx(slope, rel=1e-3)
    assert losses[0.5] - losses[0.0] == pytest.approx(slope / 2, rel=1e-3)


def test_the_policy_itself_rewrites():
    method = made(rewriter=None, rewrite_tokens=30)
    asked = []
    generate_texts = method._by_policy

    def recorded(problems, hard, step):
        texts = generate_texts(problems, hard, step)
        asked.extend(zip(problems, texts, strict=True))
        return texts

    method._by_policy = recorded
    batch = method.sampled(method.choose(0), 0)
    usable = [text for _, text in asked if text is not None]
    rewritten = {method.policy.decode(p) for p in batch.prompts} - {r["prompt"] for r in ROWS}
    assert rewritten
    assert rewritten <= set(usable)
    assert all(10 <= len(text) <= 30 for text in usable)


def test_what_reveals_the_answer_or_is_too_long_is_dropped():
    def telling(prompts, answer):
        return [f"it is {a}, what is {p}" for p, a in zip(prompts, answer, strict=True)]

    for rewriter in (telling, lambda prompts: ["x" * 2000] * len(prompts), lambda prompts:
                     [None] * len(prompts)):  # fmt: skip
        method = made(rewriter=rewriter)
        batch = method.sampled(method.choose(0), 0)
        assert len(batch) == 16
        assert method._seen["rewrite/usable"] == 0.0


def test_a_step_without_any_signal_is_passed_over(tmp_path):
    with pytest.raises(NothingToLearn, match="both right and wrong"):
        made(lambda completions: [0.0] * len(completions)).collect(0)
    run = train("clpo", data=ROWS, reward=lambda completions: [1.0] * len(completions), steps=2,
                output=tmp_path / "run", rewriter=spelled, **SMALL, **SHORT)  # fmt: skip
    assert run.folder.is_dir()


def test_a_hopeless_problem_comes_back_through_its_rewrite():
    """Rewards of problems are all 0, of rewrites 0 and 1."""
    calls = []

    def rewrites_alone(completions):
        calls.append(len(completions))
        return [float(len(calls) == 2 and i % 2) for i in range(len(completions))]

    method = made(rewrites_alone)
    batch = method.collect(0)
    assert batch.group.min() == 4
    assert len(batch) == 16
    assert method.describe_batch(batch)["rewrite/rescued"] == 1.0
    assert method.describe_batch(batch)["reward"] == 0.0


def test_it_learns(tmp_path):
    settings = {**SMALL, **SHORT, "data": ROWS, "steps": 40, "learning_rate": 3e-3}
    run = train("clpo", reward=first_letter, rewriter=spelled, output=tmp_path / "run", **settings)
    rows = [row for row in untimed(run.folder) if "difficulty/hard" in row]
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def first_letter(completions):\n"
        "    return [float(text[:1].isalpha()) for text in completions]\n"
    )
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "clpo", tmp_path, data=data, reward=f"{reward}:first_letter", minibatches=2,
        rewrite_tokens=20, **SMALL, **SHORT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard": 0.4}, "hard, medium_low, medium_high: expected rising thresholds, got 0.4, 0.3"),
        ({"kl_coefficient": 0}, "kl_scale_hard, .*: they scale the KL, which kl_coefficient=0"),
        ({"rewrite_hard": "Rewrite."}, "rewrite_hard: expected {prompt} in it"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .* at least 2"),
        ({"rows": [{"prompt": "1"}]}, "rewrite: .* rows has no column 'answer'"),
        ({"rewriter": "nothing"}, "unknown rewriter 'nothing'"),
    ],
)
def test_what_it_cannot_use_is_named(settings, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**settings)
    assert "\n" not in str(caught.value)
