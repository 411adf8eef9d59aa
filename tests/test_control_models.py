"""Distributions, running moments and saved policies of the control methods."""

import numpy as np
import pytest
import torch
from torch import distributions as reference

from postgrad.advantages.moments import RewardScale, RunningMoments
from postgrad.errors import PostgradError
from postgrad.models.control import (
    Policy,
    PolicyShape,
    SoftCritics,
    Standardiser,
    Value,
    load_policy,
    save_policy,
)
from postgrad.models.distributions import Categorical, Gaussian, SquashedGaussian


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=draws(seed), dtype=torch.float64)


def test_categorical_agrees_with_torch():
    first, second = random(7, 4, seed=1), random(7, 4, seed=2)
    actions = torch.arange(7) % 4
    ours, other = Categorical(first), Categorical(second)
    theirs = reference.Categorical(logits=first)
    torch.testing.assert_close(ours.logprobs(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    expected = reference.kl_divergence(theirs, reference.Categorical(logits=second))
    torch.testing.assert_close(ours.kl(other), expected)


def test_gaussian_agrees_with_torch():
    first, second, actions = random(7, 6, seed=1), random(7, 6, seed=2), random(7, 3, seed=3)
    ours = Gaussian(first)

    def independent(parameters: torch.Tensor) -> reference.Distribution:
        mean, log_std = parameters.chunk(2, -1)
        return reference.Independent(reference.Normal(mean, log_std.exp()), 1)

    theirs = independent(first)
    torch.testing.assert_close(ours.logprobs(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    expected = reference.kl_divergence(theirs, independent(second))
    torch.testing.assert_close(ours.kl(Gaussian(second)), expected)


@pytest.mark.parametrize("kind", [Categorical, Gaussian])
def test_kl_to_itself_is_zero_with_zero_gradient(kind):
    parameters = random(5, 4).requires_grad_()
    kl = kind(parameters).kl(kind(parameters.detach()))
    kl.sum().backward()
    assert kl.abs().max() < 1e-15
    assert parameters.grad.abs().max() < 1e-15


def test_kl_refuses_another_kind():
    with pytest.raises(ValueError, match="expected a Categorical, got Gaussian"):
        Categorical(random(2, 4)).kl(Gaussian(random(2, 4)))
    with pytest.raises(ValueError, match="expected a Gaussian, got Categorical"):
        Gaussian(random(2, 4)).kl(Categorical(random(2, 4)))


def test_gumbel_samples_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    noise = Categorical.noise(40_000, 3, generator=draws())
    actions = Categorical(probabilities.log().expand(40_000, 3)).sample(noise)
    frequencies = torch.bincount(actions, minlength=3) / len(actions)
    # five standard errors
    assert (frequencies - probabilities).abs().max() < 5 * (0.25 / 40_000) ** 0.5


def test_squashed_density_agrees_with_torch_and_stays_finite_at_the_edge():
    parameters, noise = random(6, 4), random(6, 2, seed=1)
    policy = SquashedGaussian(parameters)
    before = policy.sample_before(noise)
    mean, log_std = parameters.chunk(2, -1)
    theirs = reference.TransformedDistribution(
        reference.Normal(mean, log_std.exp()), reference.TanhTransform()
    )
    torch.testing.assert_close(policy.log_density(before), theirs.log_prob(before.tanh()))
    torch.testing.assert_close(policy.sample(noise), before.tanh())
    assert policy.log_density(torch.full((6, 2), 300.0, dtype=torch.float64)).isfinite().all()


def test_moments_of_batches_are_those_of_all_values():
    values = random(1000, 3) * torch.tensor([1.0, 5.0, 0.1]) + 40
    moments = RunningMoments(3)
    for part in values.split([1, 400, 99, 500]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.variance, values.var(0, correction=0))
    with pytest.raises(ValueError, match=r"expected \[n, 3\]"):
        moments.update(values[:, :2])


def test_reward_scale_is_the_deviation_of_the_discounted_return():
    rewards, ends = random(30, 2).float(), torch.zeros(30, 2, dtype=torch.bool)
    ends[[4, 20], [0, 1]] = True
    whole, parts = RewardScale(2, 0.9), RewardScale(2, 0.9)
    scaled = whole(rewards, ends)
    running, seen = np.zeros(2), []
    for reward, end in zip(rewards.numpy(), ends.numpy(), strict=True):
        running = 0.9 * running + reward
        seen.append(running.copy())
        running[end] = 0
    np.testing.assert_allclose(scaled, rewards / np.std(seen), rtol=1e-5)
    # in two parts, and through a saved state, the later part is scaled the same
    parts(rewards[:11], ends[:11])
    resumed = RewardScale(2, 0.9)
    resumed.load_state_dict(parts.state_dict())
    torch.testing.assert_close(resumed(rewards[11:], ends[11:]), scaled[11:])


def test_standardiser_changes_only_by_update():
    standardise = Standardiser(2)
    seen = random(500, 2).float() * 3 + 7
    assert standardise.empty
    torch.testing.assert_close(standardise(seen[:5] / 10), seen[:5] / 10)
    standardise.update(seen)
    assert not standardise.empty
    result = standardise(seen)
    torch.testing.assert_close(result.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert standardise(torch.full((1, 2), 1e9)).max() == 10


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "squashed-gaussian"])
def test_saved_policies_act_the_same(kind, tmp_path):
    shape = PolicyShape(kind, 3, 2, (8, 8), standardise=kind != "squashed-gaussian")
    policy = Policy(shape, draws())
    if isinstance(policy.standardise, Standardiser):
        policy.standardise.update(random(50, 3).float() + 2)
    save_policy(policy, {"name": "Some-v0"}, tmp_path / "model")
    loaded, environment = load_policy(tmp_path / "model")
    observations = random(9, 3, seed=4).float()
    noise = policy.noise(9, generator=draws(5))
    assert torch.equal(policy.act(observations, noise), loaded.act(observations, noise))
    assert torch.equal(policy.act(observations), loaded.act(observations))
    assert environment == {"name": "Some-v0"}


def test_networks_derive_from_their_generator_alone():
    torch.manual_seed(1)
    first = Policy(PolicyShape("gaussian", 3, 2, (8,), False), draws(7))
    torch.manual_seed(2)
    second = Policy(PolicyShape("gaussian", 3, 2, (8,), False), draws(7))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_critics_give_one_value_per_state():
    observations, actions = random(5, 3).float(), random(5, 2).float()
    critics = SoftCritics(3, 2, [8], draws())
    assert critics.q_values(observations, actions).shape == (2, 5)
    assert critics(observations).shape == (5,)
    assert Value(3, [8], torch.nn.Identity(), draws())(observations).shape == (5,)


def test_a_folder_without_a_policy_is_said(tmp_path):
    with pytest.raises(PostgradError, match=r"holds no control policy: control\.json"):
        load_policy(tmp_path)


def test_squashed_policies_have_no_exact_distribution():
    policy = Policy(PolicyShape("squashed-gaussian", 3, 2, (8,), False), draws())
    with pytest.raises(ValueError, match="no exact KL"):
        policy.distribution(torch.zeros(1, 3))
