"""Recorded decoding steps: what a recording may hold, and that replaying one is decoding.

No GPU is needed: PyTorch's tracer records a step's operations with their shapes and numbers as they
are, as a CUDA graph does, and replays them on the CPU.
"""

from itertools import pairwise

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import architectures
from postgrad.models import decoding
from postgrad.models.language import LoraSettings, load_policy
from postgrad.models.recording import obstacle_to_recording
from postgrad.sampling.generation import SamplingSettings, generate


@pytest.fixture
def recordings(monkeypatch):
    """Steps of fixed shapes, recorded by the tracer; the shapes of what was recorded."""
    shapes = []

    def recorded(step, given):
        given = given.clone()
        assert obstacle_to_recording(step, given) is None
        shapes.append(len(given))
        graph = make_fx(lambda now: step(now))(given)
        return graph

    monkeypatch.setattr(decoding, "can_record", lambda device: True)
    monkeypatch.setattr(decoding, "recorded", recorded)
    monkeypatch.setattr(decoding, "_FIRST_ROOM_RECORDED", 8)
    return shapes


def prompts():
    return [torch.arange(start, start + size) for start, size in ((5, 7), (20, 31), (60, 2))]


def sampled(policy, **changes):
    settings = SamplingSettings(max_new_tokens=20, temperature=1.3)
    return generate(policy, prompts(), settings, samples=[3, 1, 5], seeds=range(9), **changes)


@pytest.mark.parametrize("name", architectures.SHARING)
def test_replayed_steps_sample_what_was_scored(name, recordings):
    policy = architectures.policy(name)
    policy.end_tokens = frozenset({1, 2, 3})
    rollouts = sampled(policy)
    scores = policy.score(rollouts.prompts, rollouts.responses, temperature=1.3)
    torch.testing.assert_close(
        torch.cat(rollouts.logprobs), scores.logprobs[scores.mask], rtol=0, atol=1e-4
    )
    # the first eight tokens, the next eight, the rest, and wherever half of the rows were done
    assert len(recordings) >= 3
    assert recordings == sorted(recordings, reverse=True)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_replayed_steps_draw_the_same_samples(tune, request):
    policy = load_policy("tiny", tune=tune, lora=LoraSettings(rank=4))
    policy.freeze_reference()
    plain, mixed = sampled(policy), sampled(policy, mixture=0.3)
    request.getfixturevalue("recordings")
    for before, now in ((plain, sampled(policy)), (mixed, sampled(policy, mixture=0.3))):
        for one, other in zip(before.responses, now.responses, strict=True):
            assert one.tolist() == other.tolist()
        torch.testing.assert_close(
            torch.cat(now.logprobs), torch.cat(before.logprobs), rtol=0, atol=1e-5
        )


def test_recording_anew_has_to_be_worth_it(recordings):
    policy = architectures.policy("llama")
    policy.end_tokens = frozenset(range(12))
    rollouts = generate(
        policy, prompts(), SamplingSettings(max_new_tokens=60), samples=8, seeds=range(24)
    )
    assert rollouts.finished.sum() > 12
    # 24, 12, 6, 3, 2, 1 rows and, at the latest, four sizes of buffers
    assert len(recordings) <= 6 + 4
    for before, after in pairwise(recordings):
        assert after == before or after <= before / 2


def test_what_waits_for_the_device_or_leaves_it_is_no_step_to_record():
    numbers, mask = torch.arange(6), torch.arange(6) > 3
    off = torch.device("meta")

    def obstacle(step):
        return obstacle_to_recording(step, numbers)

    assert obstacle(lambda given: given + int(given[2])) == "aten._local_scalar_dense.default"
    assert obstacle(lambda given: given[mask]) == "aten.index.Tensor"
    assert obstacle(lambda given: given.nonzero()) == "aten.nonzero.default"
    assert obstacle(lambda given: given.to(off)) == "aten._to_copy.default"
    assert obstacle(lambda given: given[numbers].index_copy_(0, given, given) * 2) is None
