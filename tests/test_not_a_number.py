"""Faults of losses and advantages that random batches found, one by one."""

import math

import pytest
import torch

from postgrad.advantages.group import batch_standardised, group_standardised, lite
from postgrad.advantages.moments import RunningMoments
from postgrad.advantages.pairing import best_and_worst, knockout, tournament
from postgrad.advantages.sample_weights import exponential_weights
from postgrad.advantages.shaping import shaped_rewards
from postgrad.objectives.estimator import one_side, ring, stabilised, two_side
from postgrad.objectives.reward_modeling import preference_strength
from postgrad.objectives.supervised import values_from_logits

NAN = torch.tensor([[0.5, math.nan], [0.5, 0.5]])


@pytest.mark.parametrize("choose", [best_and_worst, knockout, tournament])
def test_no_choice_is_made_by_nan(choose):
    with pytest.raises(ValueError, match="preferences must not hold NaN"):
        choose(NAN)


def test_equal_rewards_have_advantage_and_slope_zero():
    rewards = torch.ones(4, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1])
    for found in (
        group_standardised(rewards, groups, eps=0.0),
        batch_standardised(rewards, eps=0.0),
        lite(rewards, groups, eps=0.0),
    ):
        assert found.tolist() == [0.0] * 4
        (slope,) = torch.autograd.grad(found.sum(), rewards)
        assert bool(slope.isfinite().all())


def test_equal_features_have_a_finite_slope():
    feature = torch.ones(3, requires_grad=True)
    eligible, groups = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    shaped_rewards(torch.ones(3), eligible, feature, groups).sum().backward()
    assert bool(feature.grad.isfinite().all())


def test_a_model_that_tells_no_pair_apart_has_a_finite_slope():
    scores = torch.zeros(2, 3, 2, requires_grad=True)
    mean, _ = preference_strength(scores, normalised=True)
    mean.sum().backward()
    assert bool(scores.grad.isfinite().all())


def test_masked_logits_reach_no_gradient():
    logits = torch.zeros(1, 2, 3)
    logits[0, 1] = torch.inf
    logits.requires_grad_()
    mask = torch.tensor([[True, False]])
    values_from_logits(logits, torch.tensor([[0, 0]]), mask=mask).values.sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert not bool(logits.grad[0, 1].any())


@pytest.mark.parametrize(
    "keep",
    [
        lambda ratio, advantages: one_side(ratio, advantages, 0.2, 0.2),
        lambda ratio, advantages: two_side(ratio, 0.2, 0.2),
        lambda ratio, advantages: ring(ratio, advantages, 0.2, 0.2, 0.5, 0.5),
    ],
)
def test_no_stabilisation_mask_hides_a_ratio_that_is_nan(keep):
    ratio, advantages = torch.tensor([[1.0, math.nan]]), torch.ones(1, 2)
    loss = -stabilised(ratio, keep(ratio, advantages)) * advantages
    assert bool(loss[0, 1].isnan())


def test_moments_of_nothing_change_nothing():
    moments = RunningMoments(2)
    moments.update(torch.zeros(0, 2))
    assert moments.mean.tolist() == [0.0, 0.0]


def test_an_exponential_weight_that_overflows_is_an_error():
    with pytest.raises(ValueError, match="overflows: rewards reach 1000"):
        exponential_weights(torch.tensor([[1000.0, 0.0]]), beta=0.1)
