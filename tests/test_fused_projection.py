"""The fused projection: asked for the right thing, and used only where it agrees and is faster.

cut-cross-entropy needs a GPU. What stands for it here takes the arguments that it takes, and
computes the same by writing all logits to memory.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from postgrad.models import fused_projection
from postgrad.models.fused_projection import fused_is_faster
from postgrad.objectives.projection import LogitTransform
from postgrad.objectives.projection import project_logprobs as project_in_parts


def linear_cross_entropy(e, c, targets, softcap=None, reduction="mean", filter_eps="high"):
    assert e.dtype == c.dtype
    assert (reduction, filter_eps) == ("none", None)
    logits = (e @ c.t()).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@pytest.fixture
def install(monkeypatch):
    """Put a function in the place of cut-cross-entropy's."""
    fused_is_faster.cache_clear()

    def put(function=linear_cross_entropy):
        package = SimpleNamespace(linear_cross_entropy=function)
        monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
        monkeypatch.setattr(fused_projection, "find_spec", lambda name: package)

    yield put
    fused_is_faster.cache_clear()


def given(width=24, vocabulary=60, tokens=30):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=random).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=random)


@pytest.mark.parametrize(
    ("transform", "temperature"),
    [
        (LogitTransform(), 1.0),
        (LogitTransform(scale=0.25), 0.7),
        (LogitTransform(scale=0.5, softcap=3.0), 1.0),
    ],
)
def test_it_is_asked_for_what_the_projection_in_parts_gives(transform, temperature, install):
    install()
    hidden, weight, targets = given()
    slope = torch.linspace(-1, 1, len(targets))
    found = fused_projection._fused(
        hidden, weight, targets, torch.float32, transform.scale / temperature, transform.softcap
    )
    expected, _ = project_in_parts(
        hidden, weight, targets, temperature=temperature, transform=transform
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, (hidden, weight), slope),
        torch.autograd.grad(expected, (hidden, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_is_used_where_it_agrees_and_is_faster(install, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(fused_projection, "time", clock)

    def taking(seconds, function):
        def timed(*arguments, **named):
            clock.now += seconds
            return function(*arguments, **named)

        return timed

    def faster(dtype=torch.bfloat16):
        fused_is_faster.cache_clear()
        return fused_is_faster(torch.device("cpu"), dtype, 64, 512, None)

    monkeypatch.setattr(fused_projection, "project_in_parts", taking(2, project_in_parts))
    monkeypatch.setattr(fused_projection, "find_spec", lambda name: None)
    assert not faster()
    install(taking(1, linear_cross_entropy))
    assert faster()
    assert not faster(torch.float32)
    install(taking(3, linear_cross_entropy))
    assert not faster()
    install(lambda *arguments, **named: 1.1 * linear_cross_entropy(*arguments, **named))
    assert not faster()


def test_a_kernel_that_fails_is_told_of_and_left(install):
    def broken(*arguments, **named):
        raise RuntimeError("out of shared memory\nand more")

    install(broken)
    with pytest.warns(UserWarning, match="cut-cross-entropy is not used: out of shared memory$"):
        assert not fused_is_faster(torch.device("cpu"), torch.bfloat16, 64, 512, None)
