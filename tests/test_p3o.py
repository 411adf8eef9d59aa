"""P3O: the pairwise loss's identities and worked numbers, and the method on real rollouts."""

import itertools

import pytest
import torch

from language_runs import SMALL, assert_resumes, final_weights, moved, write_rows
from postgrad.advantages.group import leave_one_out
from postgrad.advantages.penalties import kl_penalised
from postgrad.api import train
from postgrad.claims import p3o as claim
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.p3o import P3O
from postgrad.objectives.trajectory import clipped_responses, p3o_loss
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

BOTH = pytest.mark.parametrize("clipping", ["separate", "joint"])
ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 2, "max_new_tokens": 5}, "batch_size": 4}


# The loss -----------------------------------------------------------------------------------


def value_and_gradient(logprobs, old, rewards, clipping, eps=0.2):
    logprobs = torch.as_tensor(logprobs, dtype=torch.float64).clone().requires_grad_()
    old, rewards = (torch.as_tensor(x, dtype=torch.float64) for x in (old, rewards))
    loss = p3o_loss(logprobs, old, rewards, eps, clipping)
    loss.sum().backward()
    return loss.detach(), logprobs.grad


def groups(size=2, number=50):
    """Log-probabilities near and far from the old ones, and rewards, `[number, size]`."""
    random = torch.Generator().manual_seed(0)
    old, move, rewards = torch.randn(3, number, size, generator=random, dtype=torch.float64)
    return old + 0.3 * move, old, rewards


@pytest.mark.parametrize(
    ("logprobs", "losses", "gradients"),
    [
        ((-3.0, -4.0), (0.0, -0.5), ((-0.5, 0.5), (-0.5, 0.5))),
        ((-2.9, -4.05), (0.0, -0.604481), ((-0.525636, 0.525636), (-0.525636, 0.525636))),
        ((-2.7, -4.05), (0.071275, -0.770415), ((0.0, 0.642013), (0.0, 0.0))),
    ],
)
def test_the_worked_example(logprobs, losses, gradients):
    for clipping, loss, gradient in zip(("separate", "joint"), losses, gradients, strict=True):
        found, slope = value_and_gradient([logprobs], [(-3.0, -4.0)], [(1.5, 0.5)], clipping)
        assert float(found) == pytest.approx(loss, abs=5e-7)
        assert slope[0].tolist() == pytest.approx(gradient, abs=5e-7)


@BOTH
@pytest.mark.parametrize("size", [2, 5])
def test_an_offset_of_the_prompts_rewards_changes_nothing(clipping, size):
    logprobs, old, rewards = groups(size)
    rewards = (8 * rewards).round() / 8  # so that the sums below are exact
    offset = torch.randint(-40, 40, (len(rewards), 1)) / 4
    expected = value_and_gradient(logprobs, old, rewards, clipping)
    found = value_and_gradient(logprobs, old, rewards + offset, clipping)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@BOTH
def test_the_order_of_the_responses_does_not_matter(clipping):
    logprobs, old, rewards = groups(4)
    loss, gradient = value_and_gradient(logprobs, old, rewards, clipping)
    turned = value_and_gradient(*(x.flip(1) for x in (logprobs, old, rewards)), clipping)
    torch.testing.assert_close(turned[0], loss)
    torch.testing.assert_close(turned[1].flip(1), gradient)


@BOTH
def test_equal_rewards_have_no_gradient(clipping):
    logprobs, old, rewards = groups(3)
    _, gradient = value_and_gradient(logprobs, old, rewards[:, :1].expand_as(rewards), clipping)
    assert gradient.eq(0).all()


@BOTH
def test_on_policy_it_pushes_by_half_the_difference(clipping):
    _, old, rewards = groups()
    _, gradient = value_and_gradient(old, old, rewards, clipping)
    gap = rewards[:, 0] - rewards[:, 1]
    torch.testing.assert_close(gradient, torch.stack([-gap / 2, gap / 2], 1))


@BOTH
@pytest.mark.parametrize("size", [2, 5])
def test_on_policy_its_gradient_is_that_of_leave_one_out(clipping, size):
    _, old, rewards = groups(size)
    prompts = torch.arange(len(rewards)).repeat_interleave(size)
    advantages = leave_one_out(rewards.flatten(), prompts).view_as(rewards)
    logprobs = old.clone().requires_grad_()
    clipped_responses(logprobs, old, advantages).sum().backward()
    _, gradient = value_and_gradient(old, old, rewards, clipping)
    torch.testing.assert_close(gradient, logprobs.grad)
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(gradient, -centred / (size - 1))


@BOTH
def test_its_expectation_is_the_policy_gradient(clipping):
    """All pairs of four actions weighed by their probability; the product's gradient is 0."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(logits.softmax(0) @ rewards, logits)
    pairs = torch.tensor(list(itertools.product(range(4), repeat=2)))
    likely = logits.detach().softmax(0)[pairs].prod(1)
    logprobs = logits.log_softmax(0)[pairs]
    loss = p3o_loss(logprobs, logprobs.detach(), rewards[pairs], 0.2, clipping)
    (gradient,) = torch.autograd.grad(likely @ loss, logits, retain_graph=True)
    torch.testing.assert_close(-gradient, expected)
    gap = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    (nothing,) = torch.autograd.grad(likely @ (gap * logprobs.sum(1)), logits)
    torch.testing.assert_close(nothing, torch.zeros(4).double(), atol=1e-12, rtol=0)


def test_separate_clipping_stops_a_response_that_has_gained_enough():
    """The better one beyond 1 + eps; the worse one below 1 - eps; and neither on its way back."""
    old, rewards = [(-1.0, -1.0)] * 4, [(1.0, 0.0)] * 4
    moves = torch.tensor([(0.3, 0.0), (0.0, -0.3), (-0.3, 0.0), (0.0, 0.3)]) - 1.0
    _, gradient = value_and_gradient(moves, old, rewards, "separate")
    assert gradient.eq(0).tolist() == [[True, False], [False, True], [False] * 2, [False] * 2]


def test_joint_clipping_stops_the_pair():
    old, rewards = [(-1.0, -1.0)] * 3, [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    moves = torch.tensor([(0.15, -0.1), (-0.15, 0.1), (-0.15, 0.1)]) - 1.0
    _, gradient = value_and_gradient(moves, old, rewards, "joint")
    assert gradient.eq(0).tolist() == [[True] * 2, [False] * 2, [True] * 2]


@BOTH
def test_what_weighs_a_pair_is_constant(clipping):
    """Old log-probabilities and rewards take no gradient; importance ratios are not squared."""
    old = torch.tensor([[-3.0, -4.0]], requires_grad=True)
    rewards = torch.tensor([[1.5, 0.5]], requires_grad=True)
    logprobs = torch.tensor([[-2.9, -4.05]], requires_grad=True)
    p3o_loss(logprobs, old, rewards, 0.2, clipping).sum().backward()
    assert old.grad is None or old.grad.eq(0).all()
    assert rewards.grad is None
    product = (logprobs - old).sum().exp().item()
    assert logprobs.grad[0, 0].item() == pytest.approx(-product / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1)), "K of at least 2"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), "2 dimension"),
        ((torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 3)), "one shape"),
        ((torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, torch.nan]])), "finite"),
        ((torch.zeros(1, 2),) * 3 + (0.0, "joint"), "eps must be above 0"),
        ((torch.zeros(1, 2),) * 3 + (1.0,), r"eps must be in \(0, 1\)"),
        ((torch.zeros(1, 2),) * 3 + (0.2, "both"), "'separate' or 'joint', got 'both'"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        p3o_loss(*arguments)


def test_the_kl_in_the_reward():
    rewards, old, reference = torch.tensor([[1.0, 2.0], [-3.0, -4.0], [-2.0, -4.5]]).unbind()
    torch.testing.assert_close(
        kl_penalised(rewards, old, reference, 0.1), torch.tensor([1.1, 1.95])
    )
    assert kl_penalised(rewards, old, reference, 0.0).equal(rewards)
    with pytest.raises(ValueError, match="one shape"):
        kl_penalised(rewards, old, reference[:1], 0.1)
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        kl_penalised(rewards, old, reference, -1)


# The method ---------------------------------------------------------------------------------


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(reward=letters, **config):
    values = {"model": "tiny", **SHORT, **config}
    return P3O(validated(P3O.Config, values), Place(), data=ROWS, eval_data=ROWS, reward=reward)


@BOTH
def test_the_loss_is_that_of_a_real_rollout(clipping):
    """Rewards less the KL to the reference, and ratios to the policy that sampled."""
    method = moved(made(beta=0.3, clipping=clipping))
    batch = method.collect(0)
    rewards = torch.tensor([letters(texts) for texts in batch.texts])
    assert batch.scores.equal(rewards)

    def scored(i):
        found = method.policy.score([batch.prompts[i]] * 2, batch.responses[i]).logprobs
        return found.sum(1)

    with torch.no_grad():
        old = torch.stack([scored(i) for i in range(4)])
        with method.policy.reference():
            reference = torch.stack([scored(i) for i in range(4)])
        moved(method, 0.005)
        now = torch.stack([scored(i) for i in range(4)])
        loss, metrics = method.loss(batch)
    expected = p3o_loss(now, old, rewards - 0.3 * (old - reference), 0.2, clipping).mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)
    assert metrics["ratio/mean"] == pytest.approx(float((now - old).exp().mean()), rel=1e-4)
    assert method.describe_batch(batch)["kl"] == pytest.approx(
        float((old - reference).mean()), abs=1e-4
    )


def gradients(method, batch, **settings):
    loop = LoopSettings(**{"learning_rate": 1e-12, "clip_norm": 0, **settings})
    method.update(batch, Optimisers(method.modules(), loop, torch.device("cpu")))
    return [p.grad.clone() for p in method.policy.parameters()]


def test_pairs_stay_together_however_a_batch_is_cut():
    method = made(epochs=2, minibatches=2)
    batch = method.collect(0)
    parts = list(method.minibatches(batch))
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    for epoch in (parts[:2], parts[2:]):
        assert sorted(torch.cat([part.group for part in epoch]).tolist()) == [0, 1, 2, 3]
    method = made()
    batch = method.collect(0)
    whole, cut = gradients(method, batch), gradients(method, batch, token_budget=1)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_at_the_start_nothing_has_been_spent():
    metrics = (method := made()).describe_batch(method.collect(0))
    assert metrics["kl"] == 0.0
    assert metrics["reward/degenerate_groups"] < 1


def test_evaluation_measures_reward_and_divergence():
    method = made(frontier={"max_new_tokens": 5, "samples": 2})
    start = method.evaluate()
    assert start["kl"] == pytest.approx(0, abs=1e-4)
    assert 0 < start["reward"] < 1
    moved(method, 0.1)
    assert method.evaluate()["kl"] > 0.01


def test_a_shifted_reward_gives_the_same_run_to_the_bit(tmp_path):
    def halves(completions):
        return [round(2 * value) / 2 for value in letters(completions)]

    def shifted(prompts, completions):
        pairs = zip(prompts, halves(completions), strict=True)
        return [value + 64.25 * int(prompt[:2]) for prompt, value in pairs]

    settings = {**SMALL, **SHORT, "data": ROWS, "steps": 3, "epochs": 2, "beta": 0.3}
    train("p3o", reward=halves, output=tmp_path / "plain", **settings)
    train("p3o", reward=shifted, output=tmp_path / "shifted", **settings)
    one, other = final_weights(tmp_path / "plain"), final_weights(tmp_path / "shifted")
    assert all(torch.equal(one[name], other[name]) for name in one)


@BOTH
def test_it_learns(clipping, tmp_path):
    settings = {**SMALL, **SHORT, "batch_size": 16, "learning_rate": 3e-3, "epochs": 2}
    settings |= {"clipping": clipping, "beta": 0.01, "steps": 24}
    train("p3o", data=ROWS, reward=letters, output=tmp_path / "run", **settings)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    first, last = torch.tensor(rewards[:6]), torch.tensor(rewards[-6:])
    # far beyond the noise of a mean over six steps
    noise = float((first.var() / 6 + last.var() / 6).sqrt())
    assert float(last.mean() - first.mean()) > max(0.15, 4 * noise)


def reward_file(folder):
    file = folder / "reward.py"
    file.write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    return f"{file}:letters"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "prompts.jsonl", ROWS),
        "reward": reward_file(tmp_path),
        "epochs": 2,
        "minibatches": 2,
        "save_every": 2,
    }
    assert_resumes("p3o", tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"samples": 1}}, "rollout.samples: .*at least 2 samples a prompt, got 1"),
        ({"rollout": {"temperature": 0.7}}, "rollout.temperature: expected 1, got 0.7"),
        ({"eps": 0}, "eps: .*greater than 0"),
        ({"eps": 1.0}, "eps: expected less than 1 with clipping=separate, got 1"),
        ({"beta": -1}, "beta: .*greater than or equal to 0"),
        ({"minibatches": 5}, "minibatches: 5 .*batch_size of 4"),
        ({"reward": None}, "reward: .* brings no verifier of its own"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_written(settings, message, tmp_path):
    given = {"data": ROWS, "reward": letters, **SMALL, **SHORT, **settings}
    with pytest.raises(PostgradError, match=message) as caught:
        train("p3o", output=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# The claim's bandit -------------------------------------------------------------------------


def test_on_the_bandit_a_shift_changes_nothing_for_differences():
    plain, shifted = (claim.learnt("P3O", 0, 0, 20, scale)[-1] for scale in (0.0, 10.0))
    assert shifted == pytest.approx(plain, abs=1e-9)
    plain, shifted = (
        claim.learnt("moving-average baseline", 0, 0, 20, scale)[-1] for scale in (0.0, 10.0)
    )
    assert abs(shifted - plain) > 0.01


def test_the_shift_of_a_prompt_is_its_own_and_stays():
    shifts = [claim.shift_of(prompt) for prompt in ("the soup was", "the film was", "our town was")]
    assert shifts == [
        claim.shift_of(prompt) for prompt in ("the soup was", "the film was", "our town was")
    ]
    assert all(-1 <= shift <= 1 and (4 * shift).is_integer() for shift in shifts)
    assert len(set(shifts)) > 1
