"""Reward models and critics: one number a token on a language model's body."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from postgrad.errors import PostgradError
from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.language import LanguagePolicy, LoraSettings, load_policy
from postgrad.models.scalar import ScalarModel, load_scalar
from postgrad.models.scoring import plain_states


def with_random_head(model):
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def model():
    return with_random_head(ScalarModel.on_body_of(load_policy("tiny")))


def gpt2():
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return LanguagePolicy(GPT2LMHeadModel(config), tokenizer)


def items(model):
    texts = [("2+2=", "4"), ("2+2=", "four, I think"), ("hello", " you"), ("a", "b")]
    prompts = [model.render(prompt) for prompt, _ in texts]
    return prompts, [model.encode_response(response) for _, response in texts]


def test_a_new_model_says_nothing():
    model = ScalarModel.on_body_of(load_policy("tiny"))
    prompts, responses = items(model)
    assert (model.rewards(prompts, responses) == 0).all()
    assert (model.values(prompts, responses) == 0).all()


@pytest.mark.parametrize("policy", [lambda: load_policy("tiny"), gpt2], ids=["llama", "gpt2"])
def test_shared_prompts_change_nothing(policy):
    model = with_random_head(ScalarModel.on_body_of(policy()))
    assert model.shares_prefixes
    prompts, responses = items(model)
    plain = plain_states(model.network, prompts, responses)
    for reward, value, states in zip(
        model.rewards(prompts, responses), model.values(prompts, responses), plain, strict=True
    ):
        expected = model.head(states).squeeze(-1)
        torch.testing.assert_close(reward, expected[-1], rtol=1e-4, atol=1e-4)
        length = len(states) - 1
        torch.testing.assert_close(value[:length], expected[:-1], rtol=1e-4, atol=1e-4)
        assert (value[length:] == 0).all()


def test_a_value_is_the_number_of_the_beginning(model):
    """V(s_t) does not see token t: it is the number of prompt and response up to before it."""
    prompts, responses = items(model)
    values = model.values(prompts, responses)
    for t in range(2):
        expected = model.rewards(prompts, [response[:t] for response in responses])
        torch.testing.assert_close(values[:, t], expected, rtol=1e-4, atol=1e-4)


def test_the_number_is_that_of_the_end_token_even_where_it_pads(model):
    """The classic fault: the end token taken for padding, and the number read before it."""
    model.network.config.pad_token_id = model.tokenizer.eos_token_id
    prompts, responses = items(model)
    for i in range(len(prompts)):
        whole = torch.cat([prompts[i], responses[i]])
        states = model.network.get_decoder()(input_ids=whole[None]).last_hidden_state[0]
        torch.testing.assert_close(
            model.rewards([prompts[i]], [responses[i]])[0],
            model.head(states[-1]).squeeze(),
            rtol=1e-4,
            atol=1e-4,
        )


def test_the_body_is_a_copy_and_learns():
    policy = load_policy("tiny")
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    model = with_random_head(ScalarModel.on_body_of(policy))
    prompts, responses = items(model)
    model.rewards(prompts, responses).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_a_saved_model_is_one_that_transformers_loads(model, tmp_path):
    model.save(tmp_path)
    prompts, responses = items(model)
    loaded = load_scalar(str(tmp_path))
    torch.testing.assert_close(
        loaded.rewards(prompts, responses), model.rewards(prompts, responses)
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for i in range(len(prompts)):
        logits = theirs(input_ids=torch.cat([prompts[i], responses[i]])[None]).logits
        own = model.rewards([prompts[i]], [responses[i]])
        torch.testing.assert_close(logits[0], own, rtol=1e-4, atol=1e-4)


def test_a_body_with_an_adapter_is_merged():
    policy = load_policy("tiny", tune="lora", lora=LoraSettings(rank=2))
    model = ScalarModel.on_body_of(policy)
    assert not model.adapted
    prompts, responses = items(model)
    assert model.values(prompts, responses).shape == (4, max(map(len, responses)))


def test_what_is_no_reward_model(tmp_path):
    load_policy("tiny").save(tmp_path)
    with pytest.raises(PostgradError, match="expected a reward model"):
        load_scalar(str(tmp_path))
    with pytest.raises(PostgradError, match="cannot be loaded"):
        load_scalar(str(tmp_path / "nothing"))
