"""vLLM within the process: it draws by the policy's weights, whatever they have become."""

import pytest
import torch

from language_runs import SMALL
from postgrad.api import train
from postgrad.errors import PostgradError
from postgrad.models.exporting import exported_weights
from postgrad.models.language import LoraSettings, load_policy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.sampling.vllm_engine import VLLMEngine
from postgrad.training.record import read_rows
from with_vllm.models import long_prompts, write_small_model

CLOSE = 2e-3  # nats: the kernels are others, the weights the same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine():
    made = VLLMEngine(0.1)
    yield made
    made.close()


@pytest.fixture
def policy(folder, engine):
    policy = load_policy(folder)
    policy.engine = engine
    return policy


def drawn(policy, *, texts=("12+12=", "7+5="), samples=3, seed=0, limits=None, **settings):
    prompts = [policy.render(text) for text in texts]
    seeds = range(seed, seed + samples * len(prompts))
    settings = SamplingSettings(**{"max_new_tokens": 8, **settings})
    return generate(policy, prompts, settings, samples=samples, seeds=seeds, limits=limits)


def off(policy, rollouts, temperature=1.0):
    """The largest difference between the engine's log-probabilities and the policy's."""
    with torch.no_grad():
        own = policy.score(rollouts.prompts, rollouts.responses, temperature=temperature).logprobs
    return max(
        float((own[i, : len(logprobs)] - logprobs).abs().max())
        for i, logprobs in enumerate(rollouts.logprobs)
    )


def change(policy, size=0.3):
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_the_policys_at_the_sampling_temperature(policy, temperature):
    assert off(policy, drawn(policy, temperature=temperature), temperature) < CLOSE


def test_the_most_probable_tokens_are_those_that_this_process_takes(policy):
    by_engine = drawn(policy, temperature=0.0, samples=1)
    policy.engine = None
    own = drawn(policy, temperature=0.0, samples=1)
    assert by_engine.texts == own.texts
    assert all(
        torch.allclose(a, b, atol=CLOSE)
        for a, b in zip(by_engine.logprobs, own.logprobs, strict=True)
    )


def test_a_seed_draws_the_same_alone_and_among_others_and_another_seed_does_not(policy):
    together = drawn(policy)
    alone = drawn(policy, texts=["12+12="], samples=1, seed=2)
    assert alone.texts[0] == together.texts[2]
    assert len(set(drawn(policy, texts=["12+12="], samples=8).texts)) > 1


def test_prompts_of_more_tokens_than_vllm_takes_at_once(policy):
    prompts = long_prompts(400)  # 36,000 tokens
    rollouts = generate(policy, prompts, SamplingSettings(max_new_tokens=4), seeds=range(400))
    assert off(policy, rollouts) < CLOSE


def test_every_response_has_a_limit_of_its_own(policy):
    rollouts = drawn(policy, samples=1, limits=[3, 8])
    assert [len(response) for response in rollouts.responses] <= [3, 8]
    assert len(rollouts.responses[0]) == 3 or rollouts.finished[0]


def test_a_response_ends_with_the_token_that_completes_a_stop_string(policy):
    free = drawn(policy, samples=8, max_new_tokens=30)
    character = next(text for text in free.texts if len(text) > 9)[5]
    stopped = drawn(policy, samples=8, max_new_tokens=30, stop=(character,))
    cut = 0
    for before, after, over in zip(free.texts, stopped.texts, stopped.finished, strict=True):
        if character in before:
            assert after == before[: before.index(character) + 1]
            assert over
            cut += 1
        else:
            assert after == before
    assert cut > 0


def test_an_end_token_ends_and_is_part_of_the_response(policy):
    end = min(policy.end_tokens)
    with torch.no_grad():
        policy.network.lm_head.weight[end] += 0.1
        rollouts = drawn(policy, samples=30, max_new_tokens=60)
    assert bool(rollouts.finished.any())
    for response, over in zip(rollouts.responses, rollouts.finished, strict=True):
        assert bool(over) == (int(response[-1]) == end)
        assert end not in response[:-1].tolist()


def test_changed_weights_are_taken_up_and_old_keys_and_values_forgotten(policy, folder):
    before = drawn(policy)
    change(policy)
    after = drawn(policy)
    assert off(policy, after) < CLOSE
    assert off(load_policy(folder), after) > 0.1
    assert before.texts != after.texts
    # and those that are as they were are not handed over again
    policy.engine.metrics()
    drawn(policy)
    assert "engine/weights_seconds" not in policy.engine.metrics()


def test_an_adapter_is_merged_into_what_it_draws_by(folder, engine):
    adapted = load_policy(folder, tune="lora", lora=LoraSettings(rank=2))
    change(adapted)
    adapted.engine = engine
    rollouts = drawn(adapted)
    assert off(adapted, rollouts) < CLOSE
    assert off(load_policy(folder), rollouts) > 0.1
    assert "model.layers.0.self_attn.q_proj.weight" in exported_weights(adapted.network)


def test_nobody_elses_random_numbers_are_touched(policy):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    drawn(policy)
    assert torch.equal(torch.rand(2), expected)


def test_a_model_that_vllm_cannot_run_is_one_line(tmp_path):
    with pytest.raises(PostgradError) as caught:
        train("grpo", data="addition", steps=1, output=tmp_path / "run",
              rollout={"engine": "vllm", "cache_gib": 0.1}, **SMALL)  # fmt: skip
    assert "rollout.engine: vLLM cannot run this model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_embedded_model_trains_with_rollouts_by_vllm(tmp_path):
    """Every step is drawn by the weights of the step before: mismatch stays that of kernels."""
    rows = [{"prompt": f"Say a word that rhymes with {word}."} for word in ("cat", "sun", "day")]

    def short(completions):
        return [1.0 / (1 + len(text)) for text in completions]

    train(
        "grpo",
        model="smollm2",
        data=rows,
        reward=short,
        steps=3,
        batch_size=2,
        learning_rate=1e-4,
        precision="fp32",
        rollout={"engine": "vllm", "cache_gib": 0.5, "samples": 4, "max_new_tokens": 8},
        output=tmp_path / "run",
        report=False,
        log=[],
    )
    steps = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert len(steps) == 3
    for row in steps:
        # weights of the step before the last would be off by hundreds of times as much
        assert row["engine/logprob_difference"] < CLOSE
        assert row["engine/effective_samples"] > 0.99
        assert row["engine/weights_seconds"] > 0
