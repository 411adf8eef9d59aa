"""Loading, rendering and saving policies; the embedded models."""

import json
import string
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.errors import MissingExtra, PostgradError
from postgrad.models import embedded
from postgrad.models.cache import cached_folder
from postgrad.models.language import LoraSettings, load_policy
from postgrad.sampling.generation import SamplingSettings, generate

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2():
    return load_policy("smollm2")


# tiny ------------------------------------------------------------------------------------------


def test_tiny_reads_and_writes_every_printable_character():
    policy = load_policy("tiny")
    text = "".join(sorted(set(string.printable) - set("\t\r\x0b\x0c"))) + "  two\n\n"
    ids = policy.render(text)
    assert len(ids) == len(text)
    assert policy.decode(ids) == text
    assert len(policy.tokenizer) == 99
    assert policy.context_length == 1024
    assert policy.sharing == "shared prefix"


def test_tiny_depends_on_its_seed_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = load_policy("tiny", seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    other, third = load_policy("tiny", seed=3), load_policy("tiny", seed=4)
    weights = [p.network.lm_head.weight for p in (one, other, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_responses_are_closed_by_the_end_token():
    policy = load_policy("tiny")
    open_, closed = policy.encode_response("42", end=False), policy.encode_response("42")
    assert closed.tolist() == [*open_.tolist(), policy.tokenizer.eos_token_id]
    assert policy.decode(closed) == "42"


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(PostgradError, match="empty"):
        load_policy("tiny").render(prompt)


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(PostgradError, match="no chat template"):
        load_policy("tiny").render(QUESTION)


def test_the_network_stays_in_evaluation_mode():
    policy = load_policy("tiny").train()
    assert policy.training
    assert not any(module.training for module in policy.network.modules())


# Loading and saving ----------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_saved_policy_loads_with_transformers_and_as_a_policy(tmp_path, tune):
    policy = load_policy("tiny", tune=tune)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    policy.save(tmp_path / "model")
    files = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= files
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == policy.tokenizer.eos_token_id

    prompt, response = policy.render("1+1="), policy.encode_response("2")
    expected = policy.score([prompt], [response]).logprobs
    again = load_policy(str(tmp_path / "model"))
    torch.testing.assert_close(
        again.score([prompt], [response]).logprobs, expected, rtol=0, atol=1e-5
    )
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.cat([prompt, response])[None]
    table = network(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(
        table.gather(-1, response[:, None])[:, 0], expected[0], rtol=0, atol=1e-5
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("1+1=").input_ids == prompt.tolist()


def test_names_that_are_no_model(tmp_path):
    for name, hint in (
        ("smollm", "did you mean 'smollm2'"),
        ("tinny", "did you mean 'tiny'"),
        ("./nowhere", "smollm2, tiny"),
        (str(tmp_path / "nowhere"), "smollm2, tiny"),
    ):
        with pytest.raises(PostgradError, match=hint):
            load_policy(name)
    with pytest.raises(PostgradError, match=r"config\.json"):
        load_policy(str(tmp_path))


def test_a_folder_with_a_broken_configuration_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(PostgradError, match="cannot be loaded") as caught:
        load_policy(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    policy = load_policy("tiny")
    policy.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(policy.network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PostgradError, match="cannot be loaded"):
        load_policy(str(tmp_path))


def test_adapters_are_put_on_the_layers_that_are_named():
    one = load_policy("tiny", tune="lora", lora=LoraSettings(targets="q_proj"))
    adapted = {
        n.split(".lora_")[0].split(".")[-1] for n, _ in one.named_parameters() if "lora_" in n
    }
    assert adapted == {"q_proj"}
    with pytest.raises(PostgradError, match=r"layer of this model is called 'q_prj': .* q_proj"):
        load_policy("tiny", tune="lora", lora=LoraSettings(targets=["v_proj", "q_prj"]))


def test_wrong_tuning_and_rank():
    with pytest.raises(PostgradError, match="did you mean 'lora'"):
        load_policy("tiny", tune="lorra")
    with pytest.raises(ValueError, match="rank"):
        LoraSettings(rank=0)


# smollm2 ---------------------------------------------------------------------------------------


def test_smollm2_has_the_tokenizer_of_the_original(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert smollm2.end_tokens == {tokenizer.eos_token_id} == {2}
    assert smollm2.context_length == tokenizer.model_max_length == 8192
    assert smollm2.sharing == "shared prefix"
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]  # digits stand alone
    rendered = tokenizer.decode(smollm2.render(QUESTION))
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert rendered.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm2_answers_and_ends(smollm2):
    settings = SamplingSettings(max_new_tokens=30, temperature=0)
    rollouts = generate(smollm2, [smollm2.render(QUESTION)], settings, seeds=[0])
    assert "Paris" in rollouts.texts[0]
    assert rollouts.finished.all()


def test_smollm2_sampled_log_probabilities_equal_the_scored_ones(smollm2):
    prompts = [smollm2.render(QUESTION), smollm2.render("Once upon a time")]
    rollouts = generate(smollm2, prompts, SamplingSettings(12), samples=2, seeds=range(4))
    with torch.no_grad():
        scores = smollm2.score(rollouts.prompts, rollouts.responses)
    torch.testing.assert_close(
        torch.cat(rollouts.logprobs), scores.logprobs[scores.mask], rtol=0, atol=1e-4
    )


def test_a_converted_folder_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))

    def failing(unfinished):
        (unfinished / "weights").write_text("half")
        raise RuntimeError("killed")

    def late(unfinished):
        first = cached_folder("model", {}, lambda path: (path / "weights").write_text("first"))
        assert first.is_dir()
        (unfinished / "weights").write_text("second")

    with pytest.raises(RuntimeError, match="killed"):
        cached_folder("model", {}, failing)
    assert list((tmp_path / "cache").iterdir()) == []
    folder = cached_folder("model", {}, late)
    assert (folder / "weights").read_text() == "first"
    assert list(folder.parent.iterdir()) == [folder]


def test_without_the_converter_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"postgrad\[smollm2\]"):
        embedded.smollm2_source()


def test_without_the_package_it_is_the_model_of_the_hub(monkeypatch):
    monkeypatch.setattr(embedded, "_PACKAGE", "no-such-package-here")
    assert embedded.smollm2_source() == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_objectives_need_torch_only():
    code = (
        "import sys, postgrad.objectives.projection; "
        "sys.exit('transformers' in sys.modules or 'numpy.testing' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
