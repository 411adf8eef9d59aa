"""f-DPG: f-divergences and their gradients by samples, targets, and real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.advantages.running_means import MovingMean, PartitionFunctions
from postgrad.api import train
from postgrad.claims import f_dpg
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.f_dpg import FDPG, FDPGSettings
from postgrad.objectives.divergence import (
    DIVERGENCES,
    divergence_by_samples,
    f_divergence,
    fit_moments,
    pseudo_rewards,
    weighted_reinforce,
)
from postgrad.rewards import load_rewards
from postgrad.rewards.targets import Target
from postgrad.training.record import read_rows

FINITE = [name for name, divergence in DIVERGENCES.items() if math.isfinite(divergence.limit)]


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


LOGITS, WEIGHTS = vector(0.2, -0.1, 0.5), vector(0.5, 1.0, 0.3)
TABLE = {
    "forward-kl": (
        0.264067, (-0.858521, -2.317765, -0.381605), (0.045776, -0.315861, 0.270085)
    ),
    "reverse-kl": (0.268621, (1.152544, 0.159396, 1.963369), (-0.037557, -0.265875, 0.303432)),
    "tv": (0.315861, (0.5, -0.5, 0.5), (0.077554, -0.182241, 0.104687)),
    "js": (0.128878, (0.073366, -0.506144, 0.369901), (0.003039, -0.136654, 0.133615)),
    "chi2": (0.589726, (0.262941, -4.372036, 0.854378), (0.275884, -0.906599, 0.630715)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_worked_example(name):
    divergence = DIVERGENCES[name]
    logits = LOGITS.clone().requires_grad_()
    log_policy = logits.log_softmax(0)
    policy, target = log_policy.exp(), WEIGHTS / WEIGHTS.sum()
    value, slope, expected = TABLE[name]
    exact = f_divergence(divergence, policy, target)
    assert exact.item() == pytest.approx(value, abs=1e-6)
    rewards = pseudo_rewards(divergence, log_policy, WEIGHTS.log(), math.log(1.8))
    torch.testing.assert_close(-rewards, vector(*slope), atol=1e-6, rtol=0)
    (autograd,) = torch.autograd.grad(exact, logits, retain_graph=True)
    loss = (policy.detach() * weighted_reinforce(log_policy, rewards)).sum()
    (by_samples,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(autograd, vector(*expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(by_samples, autograd)


@pytest.mark.parametrize("name", FINITE)
def test_the_gradient_holds_where_the_target_is_zero(name):
    divergence, weights = DIVERGENCES[name], vector(0.5, 0.0, 1.5)
    logits = LOGITS.clone().requires_grad_()
    log_policy = logits.log_softmax(0)
    exact = f_divergence(divergence, log_policy.exp(), weights / 2)
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    rewards = pseudo_rewards(divergence, log_policy, weights.log(), math.log(2))
    assert float(rewards[1]) == pytest.approx(-divergence.limit, abs=1e-12)
    loss = (log_policy.exp().detach() * weighted_reinforce(log_policy, rewards)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize("name", ["reverse-kl", "reverse-chi2"])
def test_some_divergences_are_infinite_outside_the_support(name):
    policy, target = vector(0.5, 0.5), vector(1.0, 0.0)
    assert float(f_divergence(DIVERGENCES[name], policy, target)) == math.inf
    rewards = pseudo_rewards(DIVERGENCES[name], policy.log(), target.log(), 0.0)
    assert rewards[0].isfinite()
    assert rewards[1] == -math.inf


@pytest.mark.parametrize("name", DIVERGENCES)
def test_off_policy_weights_give_the_same_gradient_and_the_same_value(name):
    divergence, q = DIVERGENCES[name], vector(0.2, 0.5, 0.3)
    logits = LOGITS.clone().requires_grad_()
    log_policy = logits.log_softmax(0)
    target = WEIGHTS / 1.8
    exact = f_divergence(divergence, log_policy.exp(), target)
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    rewards = pseudo_rewards(divergence, log_policy, WEIGHTS.log(), math.log(1.8)) - 0.7
    weights = log_policy.detach() - q.log()
    loss = (q * weighted_reinforce(log_policy, rewards, weights)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    values = divergence_by_samples(divergence, log_policy, q.log(), WEIGHTS.log(), math.log(1.8))
    torch.testing.assert_close((q * values).sum(), exact.detach())


@pytest.mark.parametrize("name", FINITE)
def test_values_by_samples_count_what_lies_outside_the_support(name):
    divergence, weights, q = DIVERGENCES[name], vector(0.5, 0.0, 1.5), vector(0.2, 0.5, 0.3)
    policy = LOGITS.softmax(0)
    values = divergence_by_samples(divergence, policy.log(), q.log(), weights.log(), math.log(2))
    expected = f_divergence(divergence, policy, weights / 2)
    torch.testing.assert_close((q * values).sum(), expected)


def test_forward_kl_off_policy_is_likelihood_weighted_by_the_target():
    """DPG: w r = (pi/q)(p/pi) = p/q."""
    log_policy, q = LOGITS.log_softmax(0), vector(0.2, 0.5, 0.3)
    rewards = pseudo_rewards(DIVERGENCES["forward-kl"], log_policy, WEIGHTS.log(), math.log(1.8))
    assert (rewards >= 0).all()
    losses = weighted_reinforce(log_policy, rewards, log_policy - q.log())
    torch.testing.assert_close(losses, -WEIGHTS / (1.8 * q) * log_policy)


def test_reverse_kl_to_the_exponential_target_is_rl_with_a_kl_penalty():
    log_policy, beta, reward = LOGITS.log_softmax(0), 0.5, vector(1.0, 0.0, 0.5)
    log_base = torch.full((3,), -math.log(3), dtype=torch.float64)
    log_target = log_base + reward / beta
    log_z = float(log_target.logsumexp(0))
    rewards = pseudo_rewards(DIVERGENCES["reverse-kl"], log_policy, log_target, log_z)
    penalised = reward - beta * (log_policy - log_base)
    torch.testing.assert_close(rewards, penalised / beta - log_z - 1)
    divergence = f_divergence(
        DIVERGENCES["reverse-kl"], log_policy.exp(), (log_target - log_z).exp()
    )
    assert log_z == pytest.approx(1.308994, abs=1e-6)
    assert float(divergence) == pytest.approx(0.254474, abs=1e-6)
    objective = float((log_policy.exp() * penalised).sum())
    assert objective == pytest.approx(0.527260, abs=1e-6)
    assert objective == pytest.approx(beta * (log_z - float(divergence)), abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_at_the_target_nothing_pulls_and_its_scale_does_not_matter(name):
    divergence, log_policy = DIVERGENCES[name], LOGITS.log_softmax(0)
    rewards = pseudo_rewards(divergence, log_policy, log_policy, 0.0)
    assert float(rewards.max() - rewards.min()) < 1e-12
    assert float(f_divergence(divergence, log_policy.exp(), log_policy.exp())) == pytest.approx(0)
    scaled = pseudo_rewards(divergence, log_policy, WEIGHTS.log() + 7, math.log(1.8) + 7)
    expected = pseudo_rewards(divergence, log_policy, WEIGHTS.log(), math.log(1.8))
    torch.testing.assert_close(scaled, expected)


def test_pseudo_rewards_keep_their_ranges_at_the_extremes():
    log_t = vector(-200.0, -1.0, 0.0, 1.0, 200.0)
    nothing = torch.zeros(5, dtype=torch.float64)
    found = {
        name: pseudo_rewards(divergence, log_t, nothing, 0.0)
        for name, divergence in DIVERGENCES.items()
    }
    assert all(rewards.isfinite().all() for rewards in found.values())
    assert found["tv"].tolist() == [0.5, 0.5, 0.0, -0.5, -0.5]
    assert found["js"].min() >= -math.log(2)
    assert found["js"][0] == pytest.approx(200 - math.log(2))
    assert found["forward-kl"].min() >= 0
    assert found["chi2"].min() >= -1


def test_wrong_calls_are_refused():
    tokens = torch.zeros(2, 3)
    one = torch.zeros(3)
    js = DIVERGENCES["js"]
    with pytest.raises(ValueError, match=r"log_policy must have 1 dimension"):
        pseudo_rewards(js, tokens, tokens, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        weighted_reinforce(one, torch.zeros(2))
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match=r"log P must not be \+inf"):
            pseudo_rewards(js, one, torch.full((3,), bad), 0.0)
    with pytest.raises(ValueError, match=r"2 features need as many moments, got \[3\]"):
        fit_moments(torch.zeros(1, 5, 2), torch.zeros(3))


def test_no_gradient_flows_through_the_pseudo_reward():
    log_policy = LOGITS.clone().requires_grad_()
    rewards = pseudo_rewards(DIVERGENCES["js"], log_policy, WEIGHTS.log(), 0.0)
    assert not rewards.requires_grad
    weighted_reinforce(log_policy, rewards, log_policy - 1).sum().backward()
    torch.testing.assert_close(log_policy.grad, -rewards * (LOGITS - 1).exp())


# Means, moments and targets -------------------------------------------------------------------


def test_the_partition_function_is_the_mean_over_all_samples_so_far():
    random = torch.Generator().manual_seed(0)
    q, log_p = vector(0.2, 0.5, 0.3), WEIGHTS.log()
    partitions = PartitionFunctions(3)
    assert partitions.empty
    weights = []
    for _ in range(20):
        drawn = torch.multinomial(q, 50, replacement=True, generator=random)
        weights.append((log_p - q.log())[drawn])
        partitions.update(torch.full((50,), 1), weights[-1])
    assert float(partitions.log(torch.tensor([1])).exp()) == pytest.approx(
        float(torch.cat(weights).exp().mean())
    )
    assert float(partitions.log(torch.tensor([1])).exp()) == pytest.approx(1.8, abs=0.1)


def test_contexts_have_partition_functions_of_their_own_at_any_scale():
    partitions = PartitionFunctions(3)
    partitions.update(torch.tensor([0, 2, 0]), vector(900.0, -math.inf, 900.0))
    log_z = partitions.log(torch.tensor([2, 0]))
    assert log_z.tolist() == [-math.inf, pytest.approx(900.0)]
    assert not partitions.empty
    partitions.update(torch.tensor([2, 2, 2]), vector(0.0, -math.inf, 0.0))
    assert float(partitions.log(torch.tensor([2]))) == pytest.approx(math.log(2 / 4))
    other = PartitionFunctions(3)
    other.load_state_dict(partitions.state_dict())
    assert torch.equal(other.log(torch.tensor([0, 2])), partitions.log(torch.tensor([0, 2])))
    with pytest.raises(ValueError, match="below"):
        partitions.update(torch.tensor([0]), vector(math.inf))
    with pytest.raises(ValueError, match=r"both be \[n\]"):
        partitions.update(torch.tensor([0]), vector(1.0, 2.0))


def test_the_moving_mean_forgets():
    mean = MovingMean(3)
    assert mean.value == 0
    mean.update(vector(1.0, 2.0))
    assert mean.value == 1.5
    mean.update(vector(3.0, 4.0))
    assert mean.value == 3
    other = MovingMean(3)
    other.load_state_dict(mean.state_dict())
    other.update(vector(5.0))
    assert (other.value, mean.value) == (4, 3)
    with pytest.raises(ValueError, match="at least one"):
        MovingMean(0)


def test_fitted_weights_give_the_moments():
    features = torch.randn(2, 400, 2, generator=torch.Generator().manual_seed(0))
    wanted = vector(0.4, -0.2)
    weights = fit_moments(features, wanted, rate=0.5)
    share = (features.double() @ weights).softmax(1)
    means = (share.unsqueeze(2) * features).sum(1).mean(0)
    torch.testing.assert_close(means, wanted, atol=2e-5, rtol=0)


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def has_letter(completions):
    return [float(any(c.isalpha() for c in text)) for text in completions]


def measured(target, texts):
    rows = [{"prompt": "p"}] * len(texts)
    return target.measure(rows, texts, [torch.tensor([0])] * len(texts))


def test_targets_say_what_they_add_to_the_base():
    exponential = Target(load_rewards(letters), beta=0.5)
    found = measured(exponential, ["a1", "11", "aa"])
    torch.testing.assert_close(exponential.log_factor(found), vector(1.0, 0.0, 2.0))
    binary = Target(load_rewards(has_letter), "binary")
    assert binary.log_factor(measured(binary, ["a", "1"])).tolist() == [0.0, -math.inf]
    floored = Target(load_rewards(has_letter), "binary", floor=5.0)
    assert floored.log_factor(measured(floored, ["a", "1"])).tolist() == [0.0, -5.0]


def test_a_distributional_target_has_the_moments():
    target = Target(load_rewards(has_letter), "distributional", moments=[0.5])
    assert target.needs_fit
    found = measured(target, ["a"] * 10 + ["1"] * 90)
    target.fit(found, contexts=1)
    share = target.log_factor(found).softmax(0)
    assert float((share * found["reward"]).sum()) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(PostgradError, match=r"'has_letter' is to be 0.5, .* between 0 and 0"):
        target.fit(measured(target, ["1"] * 10), contexts=1)


# The method -----------------------------------------------------------------------------------

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 4}, "batch_size": 4}


def made(reward=letters, **config):
    values = {"model": "tiny", **SHORT, **config}
    return FDPG(validated(FDPGSettings, values), Place(), data=ROWS, reward=reward)


def gradient(method, batch, budget=None):
    method.policy.zero_grad()
    for part in batch.split(budget):
        loss, _ = method.loss(part)
        loss.backward()
    return {name: p.grad.clone() for name, p in method.policy.named_parameters()}


@torch.no_grad()
def scored(method, batch):
    return method.policy.score(batch.prompts, batch.responses).logprobs.sum(1).double()


def test_the_batch_holds_the_pseudo_rewards_of_whole_responses():
    method = moved(made(beta=0.3))
    first = method.collect(0)
    assert "log_weights" not in first
    log_policy = scored(method, first)
    with method.policy.reference():
        log_base = scored(method, first)
    torch.testing.assert_close(first.log_policy, log_policy, atol=1e-4, rtol=0)
    torch.testing.assert_close(first.log_base, log_base, atol=1e-4, rtol=0)
    log_target = log_base + torch.tensor(letters(first.texts)).double() / 0.3
    log_z = (log_target - log_policy).view(4, 4).logsumexp(1) - math.log(4)
    log_z = log_z.repeat_interleave(4)
    expected = pseudo_rewards(DIVERGENCES["js"], log_policy, log_target, log_z)
    torch.testing.assert_close(first.pseudo_reward, expected, atol=1e-4, rtol=1e-4)
    # nothing is subtracted before there is a mean; then the mean of what came before
    assert torch.equal(first.advantages, first.pseudo_reward)
    second = method.collect(1)
    torch.testing.assert_close(second.advantages, second.pseudo_reward - first.pseudo_reward.mean())


def test_the_loss_is_reinforce_on_them_however_it_is_cut():
    method = moved(made())
    batch = method.collect(0)
    with torch.no_grad():
        loss, _ = method.loss(batch)
    assert float(loss) == pytest.approx(
        float(-(batch.advantages * scored(method, batch)).mean()), rel=1e-4
    )
    assert len(list(batch.split(1))) == 16
    whole, parts = gradient(method, batch), gradient(method, batch, budget=1)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-3)


def test_prompts_whose_target_was_not_met_are_passed_over():
    def only_even(completions, answer):
        return [float(int(a) % 4 == 0) for a in answer]

    method = made(only_even, target="binary")
    batch = method.collect(0)
    odd = torch.tensor([int(ROWS[i]["answer"]) % 4 != 0 for i in batch.group.tolist()])
    assert 0 < int(odd.sum()) < len(odd)
    assert batch.advantages[odd].eq(0).all()
    assert method.describe_batch(batch)["without_support"] == float(odd.double().mean())
    loss, _ = method.loss(batch)
    assert loss.isfinite()


def test_a_target_without_support_stops_with_one_line(tmp_path):
    with pytest.raises(PostgradError, match="target: it has no support on samples") as caught:
        train(
            "f-dpg",
            data=ROWS,
            reward=lambda completions: [0.0] * len(completions),
            target="binary",
            steps=30,
            output=tmp_path / "run",
            **{**SMALL, **SHORT, "rollout": {"samples": 2, "max_new_tokens": 2}},
        )
    assert "\n" not in str(caught.value)


def test_a_frozen_proposal_is_weighted_and_follows_when_the_policy_is_closer():
    method = made(proposal="frozen", proposal_interval=2, divergence="forward-kl", beta=0.3)
    before = method.proposal.weights["network.model.embed_tokens.weight"].clone()
    moved(method)
    batch = method.collect(0)
    assert not torch.allclose(batch.log_policy, batch.log_proposal, atol=1e-3)
    with method.policy.reference():  # the proposal is still the initial policy
        torch.testing.assert_close(batch.log_proposal, scored(method, batch), atol=1e-4, rtol=0)
    with torch.no_grad():
        loss, _ = method.loss(batch)
    weights = (batch.log_policy - batch.log_proposal).exp()
    expected = -(weights * batch.advantages * scored(method, batch)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)

    def present():
        return method.proposal.weights["network.model.embed_tokens.weight"]

    # a random change is not closer to the target: the copy stays
    q, pi = vector(-1.0, -2.0), vector(-2.0, -1.0)
    method._follow_if_closer(method.proposal, pi, q, vector(-1.0, -9.0), vector(0.0, 0.0))
    assert torch.equal(present(), before)
    # the policy is likelier where the target is: the copy follows
    method._follow_if_closer(method.proposal, pi, q, vector(-9.0, -1.0), vector(0.0, 0.0))
    assert not torch.equal(present(), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "js", "beta": 0.05},
        {"divergence": "forward-kl", "proposal": "frozen", "proposal_interval": 2, "beta": 0.1},
    ],
    ids=["online", "frozen"],
)
def test_it_moves_towards_the_target(settings, tmp_path):
    run = train(
        "f-dpg",
        data=ROWS[:4],
        reward=letters,
        steps=20,
        output=tmp_path / "run",
        eval_data=ROWS[:4],
        frontier={"samples": 32, "max_new_tokens": 4},
        **{**SMALL, "batch_size": 4, "rollout": {"samples": 16, "max_new_tokens": 4}},
        **settings,
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["evaluation/reward"] for row in rows if "evaluation/reward" in row]
    assert rewards[-1] > rewards[0] + 0.1
    assert run.finished.evaluation["kl"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "binary", "reward": "has_letter"},
        {
            "target": "distributional", "reward": "letters", "moments": [0.5],
            "moment_samples": 16, "proposal": "frozen", "proposal_interval": 1,
            "divergence": "forward-kl",
        },
    ],
    ids=["binary", "distributional"],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(settings, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in t) / max(len(t), 1) for t in completions]\n"
        "def has_letter(completions):\n"
        "    return [float(any(c.isalpha() for c in t)) for t in completions]\n"
    )
    reward = f"{tmp_path / 'rewards.py'}:{settings['reward']}"
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:8])
    settings = {**SMALL, **SHORT, **settings, "data": data, "reward": reward, "save_every": 2}
    assert_resumes("f-dpg", tmp_path, **settings)


@pytest.mark.parametrize(
    ("reward", "setting", "message"),
    [
        (letters, {"divergence": "kl"}, "divergence: .*'forward-kl', 'reverse-kl'"),
        (has_letter, {"target": "binary", "divergence": "reverse-kl"}, "floor: .*infinite"),
        (has_letter, {"target": "binary", "divergence": "reverse-chi2"}, "floor: .*infinite"),
        (letters, {"rollout": {"temperature": 0.5}}, "rollout.temperature: expected 1, got 0.5"),
        (letters, {"rollout": {"top_k": 5}}, "rollout.top_k: expected 0, got 5: the target's Z"),
        (letters, {"target": "distributional"}, "moments: .* takes 1 .*one a reward, got 0"),
        (letters, {"moments": [0.5]}, "moments: target=exponential takes 0 of them, got 1"),
        (letters, {"beta": 0}, "beta: .*greater than 0"),
        (letters, {"baseline_window": 0}, "baseline_window: .*greater than 0"),
        (None, {}, "reward: .*brings no verifier"),
        (lambda completions: [0.5] * len(completions), {"target": "binary"}, "0 and 1, got 0.5"),
        (lambda completions: [math.nan] * len(completions), {}, "returned nan"),
    ],
)
def test_a_bad_setting_is_named(reward, setting, message, tmp_path):
    objects = {} if reward is None else {"reward": reward}
    with pytest.raises(PostgradError, match=message) as caught:
        train("f-dpg", data=ROWS, output=tmp_path / "run", **{**SMALL, **setting, **objects})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# The claim ------------------------------------------------------------------------------------


def test_the_constraint_of_the_table_has_the_base_rate():
    log_base, binary = f_dpg.world(0, 2000)
    assert float(log_base.exp()[binary].sum()) == pytest.approx(0.05, abs=4e-3)
    assert f_dpg.says([" lovely, old and red.", " old, new and red."], "lovely") == [1.0, 0.0]


@pytest.mark.parametrize("arm", f_dpg.NAMES)
def test_every_divergence_leads_to_the_target(arm):
    assert f_dpg.exactly(arm, 0, 1500) < 1e-4
    outcome = f_dpg.in_a_table(arm, 0, 0.05, 60)
    kl = [value for _, value in outcome.curves[f_dpg.METRIC]]
    assert kl[-1] < kl[0] - 1
