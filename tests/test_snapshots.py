"""Weights kept apart: acting by them changes nothing, and soups are sums."""

import pytest
import torch

from postgrad.models.language import LoraSettings, load_policy
from postgrad.models.snapshots import Snapshot, soup

PROMPTS = [torch.tensor([5, 6, 7])] * 2
RESPONSES = [torch.tensor([8, 9]), torch.tensor([10])]


def moved(policy, size=0.05):
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=random))


def scores(policy):
    return policy.score(PROMPTS, RESPONSES).logprobs


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_policy_acts_as_it_was_and_goes_on_as_it_is(tune):
    policy = load_policy("tiny", tune=tune, lora=LoraSettings(rank=2, alpha=4))
    snapshot = Snapshot(policy)
    before = scores(policy).detach()
    moved(policy)
    now = scores(policy)
    with snapshot.acting():
        assert torch.equal(scores(policy), before)
        assert not scores(policy).requires_grad
    assert torch.equal(scores(policy), now)
    # a gradient that was begun before is the same after
    now.sum().backward()
    got = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
    policy.zero_grad()
    scores(policy).sum().backward()
    expected = [p.grad for p in policy.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    snapshot.restore()
    assert torch.equal(scores(policy).detach(), before)


def test_a_moving_average_follows():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    snapshot = Snapshot(layer)
    torch.nn.init.ones_(layer.weight)
    snapshot.follow(0.25)
    snapshot.follow(0.25)
    assert snapshot.weights["weight"].item() == pytest.approx(1 - 0.75**2)
    other = Snapshot(layer)
    other.load_state_dict(snapshot.state_dict())
    assert torch.equal(other.weights["weight"], snapshot.weights["weight"])


def test_soups_add_and_extrapolate():
    one, other = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 0.0])}
    assert soup([one, other], [0.5, 0.5])["w"].tolist() == [2.0, 1.0]
    assert soup([one, other], [1.3, -0.3])["w"].tolist() == pytest.approx([0.4, 2.6])
    half = {"w": torch.tensor([1.0]).bfloat16()}
    assert soup([half, half], [1.3, -0.3])["w"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="different architectures"):
        soup([one, {"v": torch.zeros(2)}], [1, 1])
    with pytest.raises(ValueError, match="as many shares"):
        soup([one, other], [1.0])


def test_a_policy_acts_as_it_was_under_autocast_too():
    """Autocast remembers what it rounded: not for other weights of the same parameter."""
    policy = load_policy("tiny")
    snapshot = Snapshot(policy)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = scores(policy)
    moved(policy)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        now = scores(policy)
        with snapshot.acting():
            assert torch.equal(scores(policy), before)
        assert torch.equal(scores(policy), now)
    assert not torch.equal(now, before)
