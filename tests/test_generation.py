"""Sampling: draws, log-probabilities, stops, and independence of the neighbours in the batch."""

import math

import pytest
import torch

import architectures
from postgrad.errors import PostgradError
from postgrad.models.decoding import Decoder
from postgrad.models.language import LoraSettings, load_policy
from postgrad.sampling.drawing import draw, restrict, uniform_stream
from postgrad.sampling.generation import SamplingSettings, generate

KINDS = [*architectures.SHARING, *architectures.PLAIN]


def prompts():
    return [torch.arange(start, start + size) for start, size in ((5, 7), (20, 31), (60, 2))]


def same(one, other):
    return [a.tolist() for a in one] == [b.tolist() for b in other]


# Drawing ---------------------------------------------------------------------------------------


def test_inverse_of_the_cumulative_distribution_by_hand():
    logits = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 1e-16], dtype=torch.float64)
    tokens, logprobs = draw(logits, uniforms, SamplingSettings())
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]  # token 1 has no probability
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.5, 0.3, 0.3, 0.2, 0.2])


def test_frequencies_follow_the_probabilities():
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    uniforms = uniform_stream(3, 20_000)
    tokens, _ = draw(probabilities.log().expand(20_000, 4), uniforms, SamplingSettings())
    frequencies = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (SamplingSettings(top_k=2), [0, 2]),
        (SamplingSettings(top_p=0.49), [0]),
        (SamplingSettings(top_p=0.51), [0, 2]),
        (SamplingSettings(top_p=0.81), [0, 2, 3]),
        (SamplingSettings(top_k=3, top_p=0.84), [0, 2]),  # of the three kept: 0.526, 0.316, 0.158
        (SamplingSettings(temperature=0.5, top_p=0.7), [0, 2]),  # 0.6510, 0.2344, 0.1042, 0.0104
    ],
)
def test_restrictions_and_their_renormalised_log_probabilities(settings, kept):
    probabilities = torch.tensor([0.5, 0.05, 0.3, 0.15 + 1e-4])
    logits = probabilities.log()[None]
    assert restrict(logits, settings)[0].isfinite().nonzero().squeeze(1).tolist() == kept
    tempered = probabilities ** (1 / settings.temperature)
    allowed = tempered[kept] / tempered[kept].sum()
    middles = (allowed.cumsum(0) - allowed / 2).double()
    tokens, logprobs = draw(logits.expand(len(kept), 4), middles, settings)
    assert tokens.tolist() == kept
    assert logprobs.exp().tolist() == pytest.approx(allowed.tolist(), abs=1e-5)


def test_temperature_zero_is_greedy_with_the_log_probability_at_one():
    tokens, logprobs = draw(
        torch.tensor([[0.0, 2.0, 1.0]]), torch.zeros(1), SamplingSettings(temperature=0)
    )
    assert tokens.item() == 1
    assert logprobs.item() == pytest.approx(2 - math.log(1 + math.e + math.e**2), abs=1e-6)


def test_a_longer_stream_starts_with_the_shorter_one():
    assert uniform_stream(5, 30)[:10].tolist() == uniform_stream(5, 10).tolist()
    assert uniform_stream(5, 10).tolist() != uniform_stream(6, 10).tolist()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop", ("",)),
    ],
)
def test_settings_out_of_range_are_named(key, value):
    with pytest.raises(PostgradError, match=key):
        SamplingSettings(**{key: value})


# Generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_log_probabilities_equal_the_scored_ones(name):
    policy = architectures.policy(name)
    settings = SamplingSettings(max_new_tokens=20, temperature=1.3)
    rollouts = generate(policy, prompts(), settings, samples=[3, 1, 5], seeds=range(9))
    assert same(rollouts.prompts, [prompts()[i] for i in (0, 0, 0, 1, 2, 2, 2, 2, 2)])
    lengths = [len(response) for response in rollouts.responses]
    scores = policy.score(rollouts.prompts, rollouts.responses, temperature=1.3)
    torch.testing.assert_close(
        torch.cat(rollouts.logprobs), scores.logprobs[scores.mask], rtol=0, atol=1e-4
    )
    for response, finished, length in zip(
        rollouts.responses, rollouts.finished, lengths, strict=True
    ):
        ends = (response == 1).nonzero().squeeze(1).tolist()
        assert ends == ([length - 1] if finished else [])
        assert finished or length == 20


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2", "mamba", "bloom"])
def test_greedy_equals_transformers_own_generation(name):
    policy = architectures.policy(name)
    settings = SamplingSettings(max_new_tokens=24, temperature=0)
    rollouts = generate(policy, prompts(), settings, seeds=[0, 1, 2])
    untouched = architectures.network(name)
    for prompt, response in zip(prompts(), rollouts.responses, strict=True):
        expected = untouched.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert response.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba"])
def test_a_sample_does_not_depend_on_its_neighbours(name):
    policy = architectures.policy(name)
    settings = SamplingSettings(max_new_tokens=25)
    together = generate(policy, prompts(), settings, samples=4, seeds=range(100, 112))
    for i in (0, 5, 11):
        alone = generate(policy, [prompts()[i // 4]], settings, seeds=[100 + i])
        assert same(alone.responses, together.responses[i : i + 1])
    backwards = generate(
        policy, prompts()[::-1], settings, samples=4, seeds=list(range(100, 112))[::-1]
    )
    assert same(backwards.responses[::-1], together.responses)


def test_the_same_seed_gives_the_same_sample_and_another_another():
    policy = load_policy("tiny")
    one = generate(policy, prompts()[:1], SamplingSettings(), samples=3, seeds=[7, 7, 8])
    assert same(one.responses[:1], one.responses[1:2])
    assert not same(one.responses[:1], one.responses[2:])


def test_finished_rows_leave_the_batch(monkeypatch):
    policy = architectures.policy("llama")
    policy.end_tokens = frozenset(range(12))
    sizes = []
    feed = Decoder.feed

    def watched(self, tokens):
        sizes.append(len(tokens))
        feed(self, tokens)

    monkeypatch.setattr(Decoder, "feed", watched)
    rollouts = generate(
        policy, prompts(), SamplingSettings(max_new_tokens=60), samples=8, seeds=range(24)
    )
    lengths = torch.tensor([len(response) for response in rollouts.responses])
    assert rollouts.finished.sum() > 12
    for step, size in enumerate(sizes):
        unfinished = int((lengths > step + 1).sum())
        assert unfinished <= size <= unfinished * 8 / 7 + 1


def test_the_end_token_counts_even_where_it_is_the_padding_token():
    policy = architectures.policy("llama")
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    rollouts = generate(
        policy, prompts(), SamplingSettings(max_new_tokens=60), samples=4, seeds=range(12)
    )
    assert rollouts.finished.any()
    for i in rollouts.finished.nonzero().squeeze(1).tolist():
        scores = policy.score([rollouts.prompts[i]], [rollouts.responses[i]])
        assert rollouts.responses[i][-1] == 1
        assert scores.mask.all()
        assert scores.logprobs[0, -1].item() == pytest.approx(
            rollouts.logprobs[i][-1].item(), abs=1e-4
        )


def test_stop_strings_end_a_response_with_the_token_that_completes_them():
    policy = load_policy("tiny")
    settings = SamplingSettings(max_new_tokens=40)
    free = generate(policy, prompts(), settings, samples=2, seeds=range(6))
    assert any(len(text) > 20 for text in free.texts)
    stop = tuple(text[8:10] for text in free.texts if len(text) > 20)
    stopped = generate(
        policy, prompts(), SamplingSettings(max_new_tokens=40, stop=stop), samples=2, seeds=range(6)
    )
    for text, whole, finished in zip(stopped.texts, free.texts, stopped.finished, strict=True):
        first = min((whole.find(word) + 2 for word in stop if word in whole), default=len(whole))
        assert text == whole[:first]
        assert finished or len(text) == 40


def test_the_context_cuts_a_response_and_refuses_a_prompt_that_fills_it():
    for name in ("gpt2", "bloom"):
        policy = architectures.policy(name)
        policy.context_length = 64
        policy.end_tokens = frozenset()
        long = torch.arange(60) + 2
        rollouts = generate(
            policy, [long, torch.arange(9)], SamplingSettings(100), samples=2, seeds=range(4)
        )
        assert [len(response) for response in rollouts.responses] == [4, 4, 55, 55]
        assert not rollouts.finished.any()
        with pytest.raises(PostgradError, match="64"):
            generate(policy, [torch.zeros(64).long()], SamplingSettings(), seeds=[0])
        with pytest.raises(PostgradError, match="no tokens"):
            generate(policy, [long[:0]], SamplingSettings(), seeds=[0])


def test_wrong_numbers_of_samples_and_seeds():
    policy = load_policy("tiny")
    with pytest.raises(ValueError, match="seeds"):
        generate(policy, prompts(), SamplingSettings(), samples=2, seeds=range(5))
    with pytest.raises(ValueError, match="samples"):
        generate(policy, prompts(), SamplingSettings(), samples=[1, 0, 1], seeds=range(2))


def test_bfloat16_sampling_follows_the_weights_and_agrees_with_scoring():
    policy = load_policy("tiny", tune="lora", lora=LoraSettings(rank=4))
    full = load_policy("tiny")
    for one in (policy, full):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                rollouts = generate(one, prompts(), SamplingSettings(), samples=2, seeds=range(6))
                scores = one.score(rollouts.prompts, rollouts.responses)
            torch.testing.assert_close(
                torch.cat(rollouts.logprobs), scores.logprobs[scores.mask], rtol=0, atol=0.03
            )
            with torch.no_grad():
                for parameter in one.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn_like(parameter)
        assert all(p.dtype == torch.float32 for p in one.parameters())


def test_sampling_the_reference():
    policy = load_policy("tiny")
    policy.freeze_reference()
    before = generate(policy, prompts(), SamplingSettings(), seeds=range(3))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    with policy.reference():
        assert same(
            generate(policy, prompts(), SamplingSettings(), seeds=range(3)).responses,
            before.responses,
        )
    assert not same(
        generate(policy, prompts(), SamplingSettings(), seeds=range(3)).responses, before.responses
    )


# Mixtures of policy and reference ---------------------------------------------------------------


def drifted(name="tiny", tune="full"):
    """A policy that has moved away from its reference."""
    if name == "tiny":
        policy = load_policy("tiny", tune=tune, lora=LoraSettings(rank=4))
    else:
        policy = architectures.policy(name)
    policy.freeze_reference()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return policy


def drawn(policy, **changes):
    """Twelve samples, of different lengths."""
    return generate(policy, prompts(), SamplingSettings(12), samples=4, seeds=range(12), **changes)


POLICIES = [("tiny", "full"), ("tiny", "lora"), ("llama", "full"), ("bloom", "full")]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "tune"), POLICIES)
def test_the_ends_of_a_mixture_are_policy_and_reference_to_the_bit(name, tune, packed, monkeypatch):
    if not packed:  # as on a GPU
        monkeypatch.setattr("postgrad.products.can_pack", lambda dtype, device: False)
    policy = drifted(name, tune)
    own = drawn(policy)
    with policy.reference():
        reference = drawn(policy)
    assert not same(own.responses, reference.responses)
    for mixture, expected in ((0.0, own), (1.0, reference)):
        found = drawn(policy, mixture=mixture)
        assert same(found.responses, expected.responses)
        assert same(found.logprobs, expected.logprobs)
    assert same(drawn(policy).logprobs, own.logprobs)  # the adapter is on again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "tune"), POLICIES)
def test_every_token_of_a_mixture_is_drawn_from_the_mixture(
    name, tune, packed, precision, monkeypatch
):
    if not packed:
        monkeypatch.setattr("postgrad.products.can_pack", lambda dtype, device: False)
    policy = drifted(name, tune)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        rollouts = drawn(policy, mixture=0.3)
    size = len(policy.tokenizer) if name == "tiny" else 99
    tokens = [torch.tensor([token]) for token in range(size)]
    for i, t in ((0, 0), (5, 3), (11, 7)):
        response = rollouts.responses[i]
        t = min(t, len(response) - 1)
        before = [torch.cat([rollouts.prompts[i], response[:t]])] * size
        with torch.no_grad():
            own = policy.score(before, tokens).logprobs[:, 0]
            with policy.reference():
                reference = policy.score(before, tokens).logprobs[:, 0]
        mixed = (0.7 * own + 0.3 * reference).log_softmax(-1)
        assert float(rollouts.logprobs[i][t]) == pytest.approx(
            float(mixed[response[t]]), abs=1e-4 if precision == "fp32" else 0.1
        )


def test_a_mixture_outside_the_unit_interval_is_named():
    with pytest.raises(PostgradError, match=r"mixture: must lie in \[0, 1\], got 1.2"):
        drawn(drifted(), mixture=1.2)
