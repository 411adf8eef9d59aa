"""HPT: supervised where the policy fails, policy gradient where it does not, in one batch."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, untimed, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.hpt import HPT
from postgrad.methods.language.verifiable.policy_gradient import PolicyGradient
from postgrad.objectives.hybrid import hybrid
from postgrad.sampling.difficulty import of_groups, solve_counts
from postgrad.sampling.generation import Rollouts
from postgrad.training.optimise import Optimisers

ROWS = [
    {"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i), "solution": f"{2 * i}"} for i in range(24)
]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}


def half(prompts, completions):
    """Even prompts are right where the first character is a letter, the others never."""
    return [
        float(int(prompt[:2]) % 2 == 0 and text[:1].isalpha())
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def made(reward=half, rows=ROWS, **config):
    settings = {"model": "tiny", **SHORT, **config}
    return HPT(validated(HPT.Config, settings), Place(), data=rows, reward=reward)


def gradient(method, batch, **settings):
    """What one optimiser step would follow."""
    loop = LoopSettings(
        **{"learning_rate": 1e-12, "clip_norm": 0, "token_budget": None, **settings}
    )
    method.update(batch, Optimisers(method.modules(), loop, torch.device("cpu")))
    return torch.cat([p.grad.flatten() for p in method.policy.parameters()])


# The mathematics ---------------------------------------------------------------------------------


def test_the_gate_by_the_papers_counts():
    solved = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]).bool()
    right, total = solve_counts(solved, torch.tensor([5, 5, 5, 5, 2, 2, 2, 2]))
    assert (right.tolist(), total.tolist()) == ([0, 1], [4, 4])  # in order of the ids
    assert (right <= 0).tolist() == [True, False]
    assert (right <= 1).tolist() == [True, True]
    group = torch.tensor([5, 2, 5])
    assert of_groups(torch.tensor([False, True]), group).tolist() == [0, 2]
    with pytest.raises(ValueError, match="boolean"):
        solve_counts(solved.float(), group)
    with pytest.raises(ValueError, match="one for each group"):
        of_groups(torch.tensor([True]), group)


def two_prompts():
    """Two rollouts of one prompt, of 2 tokens and 1, and a demonstration of 3 of another."""
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [3.0, 6.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    shown = torch.tensor([False, False, True])
    counts = {
        "how": "sequence-sum-constant",
        "prompts": 2,
        "samples": 2,
        "longest": 5,
        "rollout_tokens": 3,
        "demonstration_tokens": 3,
    }
    return losses, mask, shown, counts


def test_both_terms_are_means_over_prompts_or_the_codes_sums():
    losses, mask, shown, counts = two_prompts()
    loss = hybrid(losses, mask, shown, coefficient=0.3, **counts)
    assert loss.item() == pytest.approx((1 + 2 + 4) / (4 * 5) + 0.3 * 6 / 2)
    official = hybrid(losses, mask, shown, coefficient=0.3, normalisation="official", **counts)
    assert official.item() == pytest.approx((1 + 2 + 4) / 5 + 0.3 * 6)


@pytest.mark.parametrize("normalisation", ["prompts", "official"])
@pytest.mark.parametrize("how", ["sequence-sum-constant", "token-mean", "sequence-mean"])
def test_parts_add_up_and_a_part_of_one_kind_is_finite(how, normalisation):
    losses, mask, shown, counts = two_prompts()
    counts |= {"how": how, "normalisation": normalisation}
    whole = hybrid(losses, mask, shown, **counts)
    parts = [hybrid(losses[[i]], mask[[i]], shown[[i]], **counts) for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item())
    none = {**counts, "rollout_tokens": 0}
    assert torch.isfinite(hybrid(losses[[2]], mask[[2]], shown[[2]], **none))
    with pytest.raises(ValueError, match="demonstrated must be boolean"):
        hybrid(losses, mask, shown.float(), **counts)


# The method --------------------------------------------------------------------------------------


def test_a_batch_holds_rollouts_of_solved_prompts_and_demonstrations_of_the_others():
    method = made()
    batch = method.collect(0)
    shown = batch.demonstrated
    assert 0 < int(shown.sum()) < 4
    assert len(batch.group.unique()) == 4
    assert len(batch) == int(shown.sum()) + 4 * (4 - int(shown.sum()))
    for i in range(len(batch)):
        row = ROWS[int(batch.row[i])]
        assert method.policy.decode(batch.prompts[i]) == row["prompt"]
        if shown[i]:
            assert batch.texts[i] == row["solution"]
            assert batch.responses[i].tolist()[-1] == method.policy.tokenizer.eos_token_id
            assert int(batch.mask[i].sum()) == len(row["solution"]) + 1
        else:
            assert int(row["prompt"][:2]) % 2 == 0
    metrics = method.describe_batch(batch)
    assert metrics["demonstrated"] == int(shown.sum()) / 4
    assert metrics["reward"] == half_of_all(method)


def half_of_all(method):
    """The mean reward of all rollouts of the step, also of those that have left the batch."""
    rollouts = method.sampled(method.choose(0), 0)
    assert len(rollouts) == 16
    return float(rollouts.reward.mean())


def test_the_example_with_four_rollouts():
    """v = (1, 0, 0, 0): advantages (3/4, -1/4, -1/4, -1/4); with a gate of 1 the demonstration."""

    def first_is_right(completions):
        return [float(i % 4 == 0) for i in range(len(completions))]

    batch = made(first_is_right).collect(0)
    assert not batch.demonstrated.any()
    assert batch.advantages.tolist() == [0.75, -0.25, -0.25, -0.25] * 4
    assert made(first_is_right, gate=1).collect(0).demonstrated.all()


@pytest.mark.parametrize("budget", [1, 30, None])
def test_the_gradient_is_that_of_the_formula_by_hand_however_it_is_cut(budget):
    method = moved(made(entropy_coefficient=0.0))
    batch = method.collect(0)
    assert 0 < int(batch.demonstrated.sum()) < 4
    got = gradient(method, batch, token_budget=budget)
    method.policy.zero_grad(set_to_none=True)
    total = 0.0
    for i in range(len(batch)):
        one = batch.select(torch.tensor([i]))
        logprobs = method.policy.score(one.prompts, one.responses).logprobs[0]
        if batch.demonstrated[i]:
            total = total - logprobs.mean() / 4
        else:
            total = total - batch.advantages[i] * logprobs.sum() / (4 * 4 * 5)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in method.policy.parameters()])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-3)


def test_a_gate_below_zero_is_dr_grpo_without_clip():
    settings = {"model": "tiny", **SHORT, "entropy_coefficient": 0.001}
    method = made(gate=-1)
    plain = PolicyGradient(
        validated(
            PolicyGradient.Config,
            {**settings, "mask": "none", "aggregation": "sequence-sum-constant"},
        ),
        Place(),
        data=ROWS,
        reward=half,
    )
    batch = method.collect(0)
    assert not batch.demonstrated.any()
    torch.testing.assert_close(gradient(method, batch), gradient(plain, plain.collect(0)))


def test_a_gate_of_all_is_supervised_fine_tuning():
    method = made(gate=4, entropy_coefficient=0.0, normalisation="official")
    batch = method.collect(0)
    assert batch.demonstrated.all()
    got = gradient(method, batch)
    method.policy.zero_grad(set_to_none=True)
    scores = method.policy.score(batch.prompts, batch.responses)
    (-scores.logprobs[scores.mask].mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in method.policy.parameters()])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_with_a_gate_of_zero_what_is_dropped_had_no_gradient():
    """Advantages of a group that fails as a whole are exactly zero."""
    method = made(lambda completions: [0.0] * len(completions), gate=-1, entropy_coefficient=0.0)
    assert bool((gradient(method, method.collect(0)) == 0).all())


def test_several_steps_a_rollout_keep_demonstrations_and_normalise_by_their_prompts():
    method = made(minibatches=2, epochs=2, kl_coefficient=0.1)
    batch = method.collect(0)
    assert "old_logprobs" in batch
    for part in method.minibatches(batch):
        assert part.prompt_count.unique().tolist() == [2]
        tokens = part.mask.sum(1)[part.demonstrated].sum()
        assert part.demonstration_tokens.unique().tolist() == [int(tokens)]
        moved(method, 0.01)
        loss, metrics = method.loss(part)
        assert torch.isfinite(loss)
        # the ratio of a demonstration is 1 and its KL nothing, wherever the policy has gone
        if part.demonstrated.all():
            assert metrics["ratio/mean"] == pytest.approx(1.0)
            assert metrics["kl_to_reference"] == 0.0


def test_it_learns_what_no_rollout_finds(tmp_path):
    settings = {**SMALL, **SHORT, "data": ROWS[10:14], "reward": "numeric", "steps": 40}
    settings |= {"learning_rate": 3e-3, "sample_every": 1000}
    train("hpt", output=tmp_path / "hpt", **settings)
    train("hpt", output=tmp_path / "never", gate=-1, **settings)
    rows = [row for row in untimed(tmp_path / "hpt") if "reward" in row]
    assert rows[0]["demonstrated"] == 1.0
    assert rows[-1]["demonstrated"] < 0.5
    assert rows[-1]["reward"] > 0.4
    assert all(row["reward"] == 0 for row in untimed(tmp_path / "never") if "reward" in row)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def half(prompts, completions):\n"
        "    pairs = zip(prompts, completions)\n"
        "    return [float(int(p[:2]) % 2 == 0 and t[:1].isalpha()) for p, t in pairs]\n"
    )
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "hpt", tmp_path, data=data, reward=f"{reward}:half", minibatches=2, **SMALL, **SHORT
    )
    assert 0 < untimed(tmp_path / "whole")[0]["demonstrated"] < 1


def test_an_embedded_task_brings_worked_solutions(tmp_path):
    run = train(
        "hpt",
        data={"name": "reasoning-gym/chain_sum", "limit": 4, "settings": {"max_terms": 3}},
        steps=1,
        output=tmp_path / "run",
        **{**SMALL, **SHORT, "rollout": {"samples": 2, "max_new_tokens": 80}, "eval_size": 1},
    )
    row = run.method.data.rows[0]
    assert run.method.reward.of([row], rolled(row["solution"]))[0].item() == 1.0


def rolled(text):
    none = torch.tensor([0])
    return Rollouts([none], [none], [none], torch.tensor([True]), [text])


def test_a_reward_term_says_what_is_right():
    def style(completions):
        return [2.0] * len(completions)

    rewards = [half, style]
    assert not made(rewards).collect(0).demonstrated.any()
    assert 0 < int(made(rewards, accuracy="half").collect(0).demonstrated.sum()) < 4
    assert made(rewards, accuracy="half", success=1.5).collect(0).demonstrated.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": 5}, "gate: at most rollout.samples, 4, responses can be right, got 5"),
        ({"gate": -2}, "gate: .*greater than or equal to -1"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .* at least 2"),
        ({"solution_column": "proof"}, "solution_column: rows has no column 'proof'; .*solution"),
        (
            {"rows": [*ROWS[:1], {"prompt": "2=", "answer": "2"}]},
            r"row 2: column 'solution'.*empty",
        ),
        (
            {"rows": [{**ROWS[0], "solution": "123456"}]},
            "row 1: the demonstration has 7 tokens, more than rollout.max_new_tokens=5",
        ),
        ({"accuracy": "halb"}, "unknown reward term of accuracy 'halb': did you mean 'half'"),
    ],
)
def test_what_it_cannot_use_is_named(settings, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**settings)
    assert "\n" not in str(caught.value)
