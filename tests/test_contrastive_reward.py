"""GRACE's rewards: the worked example, what cancels, what does not, and refusals."""

import math

import pytest
import torch
from torch import Tensor

from postgrad.advantages.group import group_mean_centred
from postgrad.errors import PostgradError
from postgrad.rewards.contrastive import contrastive_rationale_reward, unsupervised_rationale_reward


def directions(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


QUERY = directions(0, 90)
POSITIVE = directions(20, 50, 80, 130).view(2, 2, 2)
NEGATIVE = directions(120, 200)


def random_embeddings(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 6), (3, 4, 6), (3, 6))
    )


def advantages(rewards: Tensor) -> Tensor:
    prompts, rollouts = rewards.shape
    groups = torch.arange(prompts).repeat_interleave(rollouts)
    return group_mean_centred(rewards.flatten(), groups).view(prompts, rollouts)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_the_worked_example():
    rewards, terms = contrastive_rationale_reward(QUERY, POSITIVE, NEGATIVE)
    expected = {
        "positive": [0.939693, 0.642788, 0.984808, 0.766044],
        "negative": [0.5, 0.5, 0.342020, 0.342020],
        "consistency": [0.866025, 0.866025, 0.642788, 0.642788],
        "hard_negatives": [-0.173648, -0.173648, -0.766044, -0.766044],
    }
    assert terms.keys() == expected.keys()
    for name, values in expected.items():
        assert terms[name].flatten().tolist() == pytest.approx(values, abs=1e-6)
    assert rewards.flatten().tolist() == pytest.approx(
        [15.781681, 12.812631, 13.021765, 10.834132], abs=1e-6
    )
    assert advantages(rewards).flatten().tolist() == pytest.approx(
        [1.484525, -1.484525, 1.093817, -1.093817], abs=1e-6
    )
    without, _ = contrastive_rationale_reward(QUERY, POSITIVE, None, hard_negatives=0.0)
    torch.testing.assert_close(advantages(without), advantages(rewards))


def test_the_worked_example_without_labels():
    rewards, _ = unsupervised_rationale_reward(QUERY, POSITIVE)
    assert rewards.flatten().tolist() == pytest.approx(
        [10.444937, 6.627838, 10.786356, 10.231595], abs=1e-6
    )
    assert advantages(rewards).flatten().tolist() == pytest.approx(
        [1.908549, -1.908549, 0.277381, -0.277381], abs=1e-6
    )


@pytest.mark.parametrize("form", ["paper", "per_rollout"])
def test_terms_equal_plain_loops(form):
    query, positive, negative = random_embeddings()
    rewards, terms = contrastive_rationale_reward(
        query, positive, negative, consistency=0.3, hard_negatives=0.7, negatives=form
    )
    for i in range(3):
        for k in range(4):
            here = positive[i, k]
            attraction = cosine(query[i], here)
            agreement = sum(cosine(here, positive[i, j]) for j in range(4) if j != k) / 3
            others = [j for j in range(3) if j != i]
            if form == "paper":
                repulsion = -cosine(query[i], negative[i])
                hardest = [max(cosine(query[i], positive[j, l]) for l in range(4)) for j in others]
            else:
                repulsion = -cosine(here, negative[i])
                hardest = [cosine(here, query[j]) for j in others]
            hard = -sum(hardest) / 2
            assert float(terms["hard_negatives"][i, k]) == pytest.approx(hard)
            expected = (attraction + repulsion + 0.3 * agreement + 0.7 * hard) / 0.1
            assert float(rewards[i, k]) == pytest.approx(expected)


def test_unsupervised_terms_equal_plain_loops():
    anchor, rollouts, _ = random_embeddings()
    _, terms = unsupervised_rationale_reward(anchor, rollouts)
    for i in range(3):
        for k in range(4):
            here = rollouts[i, k]
            cross = -sum(cosine(here, anchor[j]) for j in range(3) if j != i) / 2
            assert float(terms["self"][i, k]) == pytest.approx(cosine(here, anchor[i]))
            assert float(terms["cross"][i, k]) == pytest.approx(cross)


def test_in_the_papers_form_negatives_and_other_groups_cancel():
    query, positive, negative = random_embeddings()
    base = advantages(contrastive_rationale_reward(query, positive, negative)[0])
    other = advantages(contrastive_rationale_reward(query, positive, negative.flip(0))[0])
    torch.testing.assert_close(base, other)
    changed = positive.clone()
    changed[1:] = changed[1:].flip(1, 2)
    apart = advantages(contrastive_rationale_reward(query, changed, negative)[0])
    torch.testing.assert_close(apart[0], base[0])


def test_per_rollout_negatives_do_not_cancel():
    query, positive, negative = random_embeddings()

    def estimate(q: Tensor, n: Tensor) -> Tensor:
        rewards, _ = contrastive_rationale_reward(q, positive, n, negatives="per_rollout")
        return advantages(rewards)

    base = estimate(query, negative)
    assert (estimate(query, negative.flip(0))[0] - base[0]).abs().max() > 0.1
    moved = query.clone()
    moved[1:] = query[1:].flip(0) * -1
    assert (estimate(moved, negative)[0] - base[0]).abs().max() > 0.1


@pytest.mark.parametrize("form", ["paper", "per_rollout"])
def test_only_directions_relative_to_each_other_matter(form):
    query, positive, negative = random_embeddings()
    rotation = torch.linalg.qr(random_embeddings(1)[1].view(2, 6, 6)[0]).Q
    base, _ = contrastive_rationale_reward(query, positive, negative, negatives=form)
    moved, _ = contrastive_rationale_reward(
        3 * query @ rotation, 0.1 * positive @ rotation, 7 * negative @ rotation, negatives=form
    )
    torch.testing.assert_close(moved, base)


def test_identical_rollouts_have_no_advantage():
    query, positive, negative = random_embeddings()
    same = positive[:, :1].expand(3, 4, 6)
    for form in ("paper", "per_rollout"):
        rewards, _ = contrastive_rationale_reward(query, same, negative, negatives=form)
        torch.testing.assert_close(advantages(rewards), torch.zeros(3, 4, dtype=torch.float64))


def test_the_temperature_scales_advantages_but_not_truncated_rewards():
    query, positive, negative = random_embeddings()
    truncated = torch.zeros(3, 4, dtype=torch.bool)
    truncated[1, 2] = True
    cold, _ = contrastive_rationale_reward(query, positive, negative, truncated=truncated)
    hot, terms = contrastive_rationale_reward(
        query, positive, negative, temperature=0.5, truncated=truncated
    )
    torch.testing.assert_close(hot[~truncated], cold[~truncated] / 5)
    torch.testing.assert_close(advantages(hot)[0], advantages(cold)[0] / 5)
    assert float(cold[1, 2]) == float(hot[1, 2]) == -1
    assert float(terms["positive"][1, 2]) != -1  # the terms stay what they were
    lower, _ = unsupervised_rationale_reward(
        query, positive, truncated=truncated, truncation_reward=-9.0
    )
    assert float(lower[1, 2]) == -9


def test_the_truncation_reward_is_no_floor():
    opposite, _ = contrastive_rationale_reward(QUERY, -POSITIVE, None, hard_negatives=0.0)
    assert float(opposite[0, 0]) < -1


def test_without_other_terms_it_is_the_cosine():
    query, positive, _ = random_embeddings()
    rewards, _ = contrastive_rationale_reward(
        query[:1], positive[:1, :1], None, consistency=0.0, hard_negatives=0.0, temperature=1.0
    )
    assert float(rewards) == pytest.approx(cosine(query[0], positive[0, 0]))


def test_no_gradient_flows_through_embeddings():
    query, positive, negative = (x.requires_grad_() for x in random_embeddings())
    rewards, terms = contrastive_rationale_reward(query, positive, negative)
    assert not rewards.requires_grad
    assert not any(term.requires_grad for term in terms.values())


def test_settings_without_a_meaning_are_refused_in_one_line():
    query, positive, negative = random_embeddings()
    cases = [
        (lambda: contrastive_rationale_reward(query, positive, negative, temperature=0.0), "temp"),
        (lambda: contrastive_rationale_reward(query, positive[:, :1], negative), "at least 2 of"),
        (lambda: contrastive_rationale_reward(query[:1], positive[:1], None), "at least 2 prompts"),
        (lambda: contrastive_rationale_reward(query, positive, None, negatives="all"), "'paper'"),
        (lambda: unsupervised_rationale_reward(query, positive[:, :1]), "at least 2 of"),
        (lambda: unsupervised_rationale_reward(query[:1], positive[:1]), "at least 2 prompts"),
        (lambda: unsupervised_rationale_reward(query, positive, temperature=-1.0), "temperature"),
    ]
    for call, message in cases:
        with pytest.raises(PostgradError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_refused():
    query, positive, negative = random_embeddings()
    with pytest.raises(ValueError, match=r"query must be \[3, 6\]"):
        contrastive_rationale_reward(query[:2], positive, negative)
    with pytest.raises(ValueError, match=r"negative must be \[3, 6\]"):
        contrastive_rationale_reward(query, positive, negative[:, :5])
    with pytest.raises(ValueError, match=r"must be \[B, K, d\]"):
        contrastive_rationale_reward(query, query, negative)
    with pytest.raises(ValueError, match="truncated must be boolean"):
        contrastive_rationale_reward(query, positive, None, truncated=torch.ones(3, 4))
    for broken in (0.0, math.nan, math.inf):
        spoiled = query.clone()
        spoiled[1] = broken
        with pytest.raises(ValueError, match="query holds an embedding that is zero or not finite"):
            contrastive_rationale_reward(spoiled, positive, negative)
