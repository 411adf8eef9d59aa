"""Shared-prefix scoring equals transformers' own padded forward, in values and gradients."""

import pytest
import torch

import architectures
from postgrad.errors import PostgradError
from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.language import LanguagePolicy, LoraSettings, load_policy

KINDS = [*architectures.SHARING, *architectures.PLAIN]


def plain_scores(network, prompts, responses, temperature):
    """Item by item, through the untouched network: the definition."""
    logprobs, entropies = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.cat([prompt, response])[None]
        logits = network(ids).logits[0, len(prompt) - 1 : -1] / temperature
        table = logits.log_softmax(-1)
        logprobs.append(table.gather(-1, response[:, None]).squeeze(-1))
        entropies.append(-(table.exp() * table).sum(-1))
    return logprobs, entropies


@pytest.mark.parametrize("name", architectures.SHARING)
def test_these_architectures_share_prompts(name):
    assert architectures.policy(name).sharing == "shared prefix"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bloom", "by name"), ("mamba", "by name"), ("gpt-oss", "'s_aux'")],
)
def test_these_take_the_plain_path_and_say_why(name, reason):
    sharing = architectures.policy(name).sharing
    assert sharing.startswith("plain: ")
    assert reason in sharing


@pytest.mark.parametrize("name", KINDS)
def test_scores_and_all_gradients_equal_the_plain_forward(name):
    prompts, responses = architectures.items()
    policy, untouched = architectures.policy(name), architectures.network(name)
    scores = policy.score(prompts, responses, temperature=0.8, entropy=True)
    logprobs, entropies = plain_scores(untouched, prompts, responses, 0.8)

    assert scores.mask.sum(1).tolist() == [len(response) for response in responses]
    assert scores.logprobs[~scores.mask].abs().sum() == 0
    assert scores.entropies[~scores.mask].abs().sum() == 0
    for found, wanted in ((scores.logprobs, logprobs), (scores.entropies, entropies)):
        torch.testing.assert_close(found[scores.mask], torch.cat(wanted), rtol=1e-5, atol=3e-5)
        assert float(
            (found[scores.mask].mean() - torch.cat(wanted).mean()).detach()
        ) == pytest.approx(0, abs=1e-5)

    factors = torch.linspace(-1, 1, int(scores.mask.sum()))
    total = (factors * scores.logprobs[scores.mask]).sum()
    (total + 0.1 * scores.entropies.sum()).div(len(factors)).backward()
    total = (factors * torch.cat(logprobs)).sum()
    (total + 0.1 * torch.cat(entropies).sum()).div(len(factors)).backward()
    wanted = dict(untouched.named_parameters())
    found = dict(policy.network.named_parameters())
    assert found.keys() == wanted.keys()
    for key, parameter in found.items():
        assert (parameter.grad is None) == (wanted[key].grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, wanted[key].grad, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: k + m
            )
    every = [
        torch.cat([p.grad.flatten() for p in part.values() if p.grad is not None])
        for part in (found, wanted)
    ]
    assert torch.cosine_similarity(*every, dim=0) > 0.99999


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_embeddings_equal_means_of_the_plain_hidden_states(name):
    prompts, responses = architectures.items()
    responses[3] = responses[3][:0]
    policy, untouched = architectures.policy(name), architectures.network(name)
    skips = [0, 5, 2, 0, 0, 5, 0, 12, 0]
    embeddings = policy.embed(prompts, responses, skip=skips)
    expected = torch.stack(
        [
            untouched.base_model(torch.cat([p, r])[None]).last_hidden_state[0, skip:].mean(0)
            for p, r, skip in zip(prompts, responses, skips, strict=True)
        ]
    )
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
    embeddings.square().mean().backward()
    expected.square().mean().backward()
    key = "h.0" if name in ("gpt2", "bloom") else "layers.0"
    wanted = {k: p.grad for k, p in untouched.named_parameters() if key in k}
    assert wanted
    for name_, parameter in policy.network.named_parameters():
        if key in name_:
            torch.testing.assert_close(parameter.grad, wanted[name_], rtol=1e-4, atol=1e-5)


def test_a_prompt_is_computed_once_however_many_responses_it_has():
    policy = architectures.policy("llama")
    rows = []
    policy.network.model.embed_tokens.register_forward_hook(
        lambda module, arguments, output: rows.append(output.shape[1])
    )
    prompt = torch.arange(2, 42)
    policy.score([prompt.clone() for _ in range(8)], [torch.arange(2, 12)] * 8)
    assert rows == [40 + 8 * 9]  # the last token of a response predicts nothing


def test_a_response_may_be_empty():
    policy = architectures.policy("llama")
    prompts, responses = architectures.items()
    without = policy.score(prompts, [*responses[:-1], responses[0][:0]])
    whole = policy.score(prompts, responses)
    assert without.mask[-1].sum() == 0
    torch.testing.assert_close(without.logprobs[:-1], whole.logprobs[:-1], rtol=0, atol=1e-5)


def test_bfloat16_autocast_stays_near_float32():
    policy = load_policy("tiny")
    prompts, responses = architectures.items()
    exact = policy.score(prompts, responses)
    with torch.autocast("cpu", torch.bfloat16):
        rough = policy.score(prompts, responses)
    assert rough.logprobs.dtype == torch.float32
    assert 0 < (rough.logprobs - exact.logprobs).abs().max() < 0.05


def test_sliding_window_that_layers_do_not_tell_is_noticed():
    # the mask follows the configuration, the layers' own copy of the window does not
    network = architectures.network("gemma3")
    network.model.layers[0].self_attn.sliding_window = None
    assert "sliding windows" in LanguagePolicy(network, tiny_tokenizer()).sharing


def test_reference_is_a_frozen_copy_of_full_weights():
    policy = load_policy("tiny")
    prompts, responses = architectures.items()
    with pytest.raises(ValueError, match="freeze_reference"), policy.reference():
        pass
    policy.freeze_reference()
    names = set(policy.state_dict())
    before = policy.score(prompts, responses).logprobs.detach()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    with policy.reference():
        inside = policy.score(prompts, responses).logprobs
    assert not inside.requires_grad
    torch.testing.assert_close(inside, before, rtol=0, atol=0)
    assert (policy.score(prompts, responses).logprobs - before).abs().max() > 1e-3
    assert set(policy.state_dict()) == names


def test_reference_with_an_adapter_is_the_same_network_without_it():
    prompts, responses = architectures.items()
    plain = load_policy("tiny").score(prompts, responses).logprobs
    policy = load_policy("tiny", tune="lora", lora=LoraSettings(rank=4))
    assert policy.sharing == "shared prefix"
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    policy.freeze_reference()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted = policy.score(prompts, responses).logprobs
    with policy.reference():
        inside = policy.score(prompts, responses).logprobs
    torch.testing.assert_close(inside, plain, rtol=0, atol=1e-6)
    assert (adapted - plain).abs().max() > 1e-2


def test_mistakes_are_named():
    policy = load_policy("tiny")
    prompt, response = torch.arange(5), torch.arange(4)
    with pytest.raises(ValueError, match="aligned"):
        policy.score([prompt], [])
    with pytest.raises(ValueError, match="no tokens"):
        policy.score([prompt[:0]], [response])
    with pytest.raises(PostgradError, match="more than the model's context"):
        policy.score([prompt], [torch.zeros(policy.context_length - 4, dtype=torch.long)])
    with pytest.raises(ValueError, match="nothing is left"):
        policy.embed([prompt], [response], skip=9)
    with pytest.raises(ValueError, match="skips"):
        policy.embed([prompt], [response], skip=[0, 0])


def test_with_several_threads_the_gradient_is_the_same_every_time():
    """The first tokens of all responses come from one state, whose gradient is a sum of many."""
    policy = load_policy("tiny")
    prompts = [torch.arange(5, 9)] * 512
    responses = [torch.tensor([10 + i % 80, 3, 4]) for i in range(512)]
    weight = policy.network.get_input_embeddings().weight
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = []
        for _ in range(10):
            policy.zero_grad()
            policy.score(prompts, responses).logprobs.sum().backward()
            gradients.append(weight.grad.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
