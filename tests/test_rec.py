"""REC, REP and RED: identities between them, the paper's bandit, and runs off-policy."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, untimed, write_rows
from postgrad.advantages.data_shaping import (
    balanced,
    centred_among_kept,
    exponentially_weighted,
)
from postgrad.advantages.group import group_mean_centred
from postgrad.api import train
from postgrad.batch import Batch
from postgrad.claims.rec import ThreeArms
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.parts.base import Around
from postgrad.methods.language.verifiable.rec import (
    REC,
    Dropped,
    Lowering,
    RECSettings,
    Temperature,
    Weighted,
)
from postgrad.objectives.estimator import one_side, ring, stabilised, token_weight, two_side
from postgrad.objectives.pairwise import copg
from postgrad.objectives.policy_gradient import clipped_surrogate, importance_ratio, kl_estimate
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
OPMD = {"mask": "none", "kl_reference": "sampler", "kl_estimator": "k2"}


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(**config):
    values = {"model": "tiny", **SHORT, **config}
    return REC(validated(RECSettings, values), Place(), data=ROWS, reward=letters)


def stale(method):
    """The method and a batch that an earlier policy drew."""
    method.collect(0)
    moved(method)
    return method, method.collect(1)


def gradient(method, batch):
    method.policy.zero_grad(set_to_none=True)
    loss, _ = method.loss(batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in method.policy.parameters()])


# By hand -----------------------------------------------------------------------------------------


def test_the_worked_example():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long)
    advantages = group_mean_centred(rewards, group)
    ratio = torch.tensor([1.5, 0.7, 0.9, 1.3])
    keeps = {
        "one side": one_side(ratio, advantages, 0.2, 0.2),
        "two side": two_side(ratio, 0.2, 0.2),
        "ring": ring(ratio, advantages, 0.2, 0.2, 0.6, 2.0),
    }
    of_one_side = (keeps["one side"] * advantages).tolist()
    assert of_one_side == [0, 0, -0.25, -0.25]
    sampled = {name: (keep * ratio * advantages).tolist() for name, keep in keeps.items()}
    assert sampled["one side"] == pytest.approx([0, 0, -0.225, -0.325])
    assert sampled["two side"] == sampled["ring"] == pytest.approx([0, 0, -0.225, 0])
    weighted = exponentially_weighted(rewards, group, 1.0)
    assert weighted.tolist() == pytest.approx([1.587750] + [-0.194700] * 3, abs=1e-6)


def test_one_side_with_importance_sampling_is_ppos_gradient():
    random = torch.Generator().manual_seed(0)
    new = (-torch.rand(6, 5, generator=random)).requires_grad_()
    old = new.detach() + 0.4 * torch.randn(6, 5, generator=random)
    advantages = torch.randn(6, 1, generator=random).expand(6, 5)
    mask = torch.ones(6, 5, dtype=torch.bool)
    ratio = importance_ratio(new, old, mask)
    (wanted,) = torch.autograd.grad(clipped_surrogate(ratio, advantages, 0.2, 0.3).sum(), new)
    weight = token_weight(new - old, mask)
    for bounds, expected in (((0.2, 0.3), wanted), ((1.0, torch.inf), -ratio * advantages)):
        keep = one_side(ratio.detach(), advantages, *bounds)
        loss = -(stabilised(weight, keep) * advantages).sum()
        (got,) = torch.autograd.grad(loss, new, retain_graph=True)
        torch.testing.assert_close(got, expected.detach())


def test_reinforce_is_a_step_on_the_pairwise_consistency_of_any_samples():
    """At pi = pi_now the loss over pairs has the gradient of centred REINFORCE."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=random, dtype=torch.float64, requires_grad=True)
    responses, rewards = torch.tensor([0, 3, 3, 6]), torch.tensor([0.3, 1.0, -0.2, 0.5]).double()
    logprobs = logits.log_softmax(0)[responses]
    tau = 0.7
    loss = copg((logprobs - logprobs.detach())[None], rewards[None], tau).sum()
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    centred = group_mean_centred(rewards, torch.zeros(4, dtype=torch.long))
    (reinforce,) = torch.autograd.grad(-(centred * logprobs).sum(), logits)
    torch.testing.assert_close(got, reinforce * 2 / 3)  # n / (n (n - 1) / 2) of a mean over pairs


def test_weighted_pairs_give_the_weighted_mean():
    """sum over pairs of w_i w_j (a_i - a_j)^2 has the gradient of w_i (r_i - weighted mean)."""
    rewards = torch.tensor([0.3, 1.0, -0.2, 0.5], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.long)
    logprobs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weights = ((rewards - rewards.mean()) / 0.5).exp()
    values = rewards - logprobs
    pairs = (values[:, None] - values[None, :]).square() * weights[:, None] * weights[None, :]
    (got,) = torch.autograd.grad(-pairs.sum() / 4 / weights.sum(), logprobs)
    weighted = exponentially_weighted(rewards, group, 0.5, weighted_mean=True)
    torch.testing.assert_close(got, weighted)
    assert float(weighted.sum()) == pytest.approx(0, abs=1e-12)
    assert abs(float(exponentially_weighted(rewards, group, 0.5).sum())) > 0.1


def test_the_penalty_of_whole_responses():
    new, old = torch.tensor([[-1.0, -2.0, 9.0]], requires_grad=True), torch.full((1, 3), -0.5)
    mask = torch.tensor([[True, True, False]])
    tokens = kl_estimate(new, old, mask, "k2")
    assert tokens.sum().item() == pytest.approx((0.5**2 + 1.5**2) / 2)
    whole = kl_estimate(new, old, mask, "k2", "sequence")
    assert whole.sum().item() == pytest.approx(2.0**2 / 2)
    (got,) = torch.autograd.grad(whole.sum(), new)
    assert got.tolist() == [[-2.0, -2.0, 0.0]]
    with pytest.raises(ValueError, match="level must be"):
        kl_estimate(new, old, mask, "k2", "word")


# The data ----------------------------------------------------------------------------------------


def random():
    return torch.Generator().manual_seed(0)


def test_negatives_are_dropped_until_there_are_as_many_as_positives():
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 1, 1, 0])
    groups = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    keep = balanced(rewards, groups, random())
    assert int(keep[groups == 0].sum()) == 2
    assert bool(keep[0])
    assert bool(keep[groups == 1].all())
    advantages = centred_among_kept(rewards, groups, keep)
    assert sorted(advantages[:5].tolist()) == [-0.5, 0, 0, 0, 0.5]
    torch.testing.assert_close(advantages[5:], group_mean_centred(rewards, groups)[5:])


def test_every_negative_is_dropped_alike():
    rewards, groups = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.long)
    stream = random()
    kept = sum(balanced(rewards, groups, stream).long() for _ in range(600))
    assert int(kept[0]) == 600
    assert all(150 < count < 250 for count in kept[1:].tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, g: balanced(r[:2], g, random()), r"must both be \[N\]"),
        (lambda r, g: centred_among_kept(r, g, torch.ones(3)), "keep must be boolean"),
        (lambda r, g: exponentially_weighted(r, g, 0.0), "temperature must be above 0"),
        (lambda r, g: exponentially_weighted(500 * r, g, 1.0), r"exp\(A/T\) overflows"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long))


def test_the_paths_on_the_three_armed_bandit():
    world = ThreeArms()
    rewards, group, centred = world.rewards, world.group, world.centred
    drifts = torch.zeros(3).double().index_add(0, world.drawn, centred) / 10
    assert drifts.tolist() == pytest.approx([-0.174, 0.132, 0.042])
    expected = {
        "REINFORCE": (world.converged(centred), (0, 1, 0)),
        "on-policy": (world.on_policy(), (0, 0.001, 0.999)),
        **{
            f"RED-Weight {t}": (world.converged(exponentially_weighted(rewards, group, t)), limit)
            for t, limit in (
                (1.0, (0, 0.884, 0.116)),
                (0.3, (0, 0.624, 0.376)),
                (0.1, (0.000, 0.298, 0.702)),
            )
        },
        **{
            f"AsymRE {tau}": (world.converged(centred + tau), limit)
            for tau, limit in (
                (0.1, (0, 1, 0)),
                (0.5, (0, 0.840, 0.160)),
                (1.0, (0.126, 0.732, 0.142)),
            )
        },
        **{
            f"OPMD {tau}": (world.converged(centred, penalty=tau), limit)
            for tau, limit in (
                (0.02, (0.000, 0.726, 0.274)),
                (0.1, (0.018, 0.600, 0.383)),
                (0.5, (0.181, 0.402, 0.416)),
                (1.0, (0.246, 0.368, 0.386)),
            )
        },
    }
    for name, (found, limit) in expected.items():
        assert found.tolist() == pytest.approx(limit, abs=6e-4), name


# The method --------------------------------------------------------------------------------------


def test_on_policy_all_of_rec_is_reinforce_and_opmd_adds_nothing():
    settings = (
        {"mask": "none"},
        {},
        {"denominator": "sampler"},
        {"mask": "two-side"},
        {"mask": "ring"},
        {**OPMD, "kl_coefficient": 0.2},
    )
    first, *others = (gradient(method, method.collect(0)) for method in map(made_of, settings))
    for other in others:
        torch.testing.assert_close(other, first)


def made_of(settings):
    return made(**settings)


def test_off_policy_they_differ_and_asymre_is_the_lowered_baseline():
    found = {}
    for name, settings in {
        "REINFORCE": {"mask": "none"},
        "NoIS": {},
        "IS": {"denominator": "sampler"},
        "AsymRE": {"mask": "none", "advantage": {"name": "asymre", "tau": 0.3}},
    }.items():
        method, batch = stale(made(sync_every=4, **settings))
        found[name] = gradient(method, batch)
        if name == "REINFORCE":
            lowered = batch.with_fields(advantages=batch.advantages + 0.3)
            expected = gradient(method, lowered)
    torch.testing.assert_close(found["AsymRE"], expected)
    assert not torch.allclose(found["REINFORCE"], found["NoIS"], atol=1e-5)
    assert not torch.allclose(found["IS"], found["NoIS"], atol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_opmd_is_tau_times_the_squared_log_ratio(level):
    """kl_coefficient = 2 tau, because k2 is half the square."""
    tau = 0.1
    shared = {"sync_every": 4, "kl_level": level, "aggregation": "sequence-sum", **OPMD}
    method, batch = stale(made(**shared, kl_coefficient=2 * tau))
    plain, _ = stale(made(**shared))
    with torch.no_grad():
        scores = method._score(batch)
        difference = torch.where(scores.mask, scores.logprobs - batch.old_logprobs, 0.0)
        whole = difference if level == "token" else difference.sum(1, keepdim=True)
        penalty = tau * whole.square().sum() / len(batch)
        added = method.loss(batch)[0] - plain.loss(batch)[0]
    assert float(penalty) > 1e-3
    assert added.item() == pytest.approx(penalty.item(), rel=1e-4)


def test_what_is_dropped_is_drawn_anew_in_every_step_and_counted():
    rewards = torch.tensor([1.0] + [0.0] * 7)
    part = Dropped(Dropped.Config(), Around(seed=3, samples=8))

    def dropped(step):
        fields = {"reward": rewards, "group": torch.zeros(8, dtype=torch.long)}
        return part(Batch(**fields, step=torch.full((8,), step)))

    assert int((dropped(0) == 0).sum()) == 6
    assert part.describe() == {"advantage/dropped": 0.75}
    assert dropped(0).equal(dropped(0))
    assert len({tuple(dropped(step).tolist()) for step in range(8)}) > 2


def test_rewards_that_overflow_are_named():
    part = Weighted(Temperature(temperature=0.1), Around(samples=2))
    batch = Batch(reward=torch.tensor([50.0, 0.0]), group=torch.zeros(2, dtype=torch.long))
    with pytest.raises(PostgradError, match=r"^advantage.temperature: exp\(A/T\) overflows"):
        part(batch)


@pytest.mark.parametrize("advantage", ["red-drop", "red-weight"])
def test_the_mean_reward_rises_on_stale_samples(advantage, tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 3e-3, "sync_every": 4}
    settings["rollout"] = {"samples": 8, "max_new_tokens": 5}
    train(
        "rec", data=ROWS, reward=letters, steps=32, output=tmp_path / "run", advantage=advantage,
        **settings,
    )  # fmt: skip
    rewards = [r["reward"] for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    assert sum(rewards[-8:]) / 8 - sum(rewards[:8]) / 8 > 0.15


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    data = write_rows(tmp_path / "prompts.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "data": data, "reward": f"{reward}:letters", "sync_every": 3}
    more = {**OPMD, "kl_coefficient": 0.2, "kl_level": "sequence"}
    assert_resumes("rec", tmp_path, **settings, advantage="red-drop", **more, save_every=2)
    assert any(row.get("kl_to_reference", 0) > 0 for row in untimed(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"samples": 1}}, "rollout.samples: a group's mean .* at least 2"),
        ({"mask": {"clip_low": 0}}, r"^mask.clip_low: .*greater than 0"),
        ({"mask": {"clip_high": -1}}, r"^mask.clip_high: .*greater than 0"),
        ({"mask": {"name": "ring", "outer_high": 0.1}}, "mask.outer_high: must be above"),
        ({"advantage": {"name": "asymre", "tau": -1}}, r"^advantage.tau: .*greater than or equal"),
        ({"advantage": {"name": "red-weight", "temperature": 0}}, r"^advantage.temperature: "),
        ({"advantage": "red-wieght"}, "advantage: .*did you mean 'red-weight'"),
        ({"kl_level": "word"}, "kl_level: .*'token' or 'sequence'"),
    ],
)
def test_a_bad_setting_is_named(settings, message, tmp_path):
    given = {"data": ROWS, "reward": letters, **SMALL, **SHORT, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("rec", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_tau_of_zero_is_reinforce():
    assert Lowering(tau=0).tau == 0
    method = made(mask="none", advantage={"name": "asymre", "tau": 0})
    batch = method.collect(0)
    torch.testing.assert_close(batch.advantages, group_mean_centred(batch.reward, batch.group))
