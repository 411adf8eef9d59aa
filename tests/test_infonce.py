"""InfoNCE on a causal language model: rendering, pooling, training, sentence-transformers."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad import api
from postgrad.errors import PostgradError
from postgrad.methods.representation.text import TextEncoder
from postgrad.models.language import LanguagePolicy, load_policy

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
# which text belongs to which must be learned: no letter gives it away
TRIPLES = [
    {"anchor": f"find {a}", "positive": f"def {b}()", "negative": f"def {c}()"}
    for a, b, c in zip("bcdfghjk", "rmvnsptq", "mrnvpsqt", strict=True)
]


def policy_with(template):
    policy = load_policy("tiny", seed=3)
    policy.tokenizer.chat_template = template
    return policy


def quick(folder, **settings):
    base = {
        "model": "tiny",
        "data": TRIPLES,
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "instruction": "Embed:",
        "log": [],
        "report": False,
        "device": "cpu",
    }
    return api.train("infonce", output=str(folder), **{**base, **settings})


@pytest.fixture
def triples_file(tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_text("\n".join(map(json.dumps, TRIPLES)))
    return str(path)


# Rendering and pooling ---------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHATML, NO_SYSTEM], ids=["plain", "chat", "no system"])
def test_a_text_stands_between_the_same_prefix_and_tail(template):
    encoder = TextEncoder(policy_with(template), instruction="Embed:", max_text_tokens=20)
    decode = encoder.policy.tokenizer.decode
    first, second = encoder.render("some text"), encoder.render("x")
    for ids, text in ((first, "some text"), (second, "x")):
        length = len(encoder.prefix)
        assert torch.equal(ids[:length], encoder.prefix)
        assert torch.equal(ids[len(ids) - len(encoder.tail) :], encoder.tail)
        assert decode(ids[length : len(ids) - len(encoder.tail)]) == text
    assert "Embed:" in decode(encoder.prefix)
    assert encoder.prefix_length == len(encoder.prefix)
    if template is not None:
        assert decode(encoder.tail).endswith("<|assistant|>")


def test_long_texts_are_cut_and_keep_their_tail():
    encoder = TextEncoder(policy_with(CHATML), instruction="Embed:", max_text_tokens=5)
    ids = encoder.render("abcdefghij")
    assert torch.equal(ids, encoder.render("abcde"))
    assert torch.equal(encoder.embed(["abcdefghij"]), encoder.embed(["abcde"]))


def test_embedding_is_the_mean_over_the_text_alone():
    policy = policy_with(CHATML)
    encoder = TextEncoder(policy, instruction="Embed:", max_text_tokens=20)
    texts = ["some text", "x", "another"]
    found = encoder.embed(texts)
    for text, embedding in zip(texts, found, strict=True):
        ids = encoder.render(text)
        hidden = policy.network.model(input_ids=ids[None]).last_hidden_state[0]
        own = hidden[encoder.prefix_length : len(ids) - len(encoder.tail)]
        assert len(own) == len(text)
        assert torch.allclose(embedding, own.mean(0), atol=1e-5)


def test_texts_that_cannot_be_embedded():
    encoder = TextEncoder(policy_with(None), instruction="Embed:", max_text_tokens=20)
    with pytest.raises(PostgradError, match="empty"):
        encoder.embed(["a", "  \n"])
    policy = policy_with(None)
    with pytest.raises(PostgradError, match=r"max_text_tokens: \d+ do not fit"):
        TextEncoder(policy, instruction="Embed:", max_text_tokens=policy.context_length)


def test_surrounding_space_does_not_matter():
    encoder = TextEncoder(policy_with(None), instruction="Embed:", max_text_tokens=20)
    assert torch.equal(encoder.render("\n text "), encoder.render("text"))


# Training ----------------------------------------------------------------------------------------


def test_learns_to_retrieve(tmp_path, triples_file):
    pairs = {"name": triples_file}
    run = quick(tmp_path / "run", data=pairs, eval_data=pairs, steps=60, batch_size=8)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert run.evaluation["mrr"] > max(0.8, first["evaluation/mrr"] + 0.2)


def test_loss_is_that_of_the_whole_batch_and_reaches_all_weights():
    method = quick_method()
    batch = method.collect(0)
    loss, metrics = method.loss(batch)
    loss.backward()
    texts = [*batch.anchor, *batch.positive, *batch.negative]
    vectors = torch.nn.functional.normalize(method.encoder.embed(texts), dim=-1).detach()
    logits = vectors[:4] @ vectors[4:].T / 0.05
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert metrics["similarity"] == pytest.approx(
        float((vectors[:4] * vectors[4:8]).sum(-1).mean()), abs=1e-5
    )
    inner = [p for n, p in method.policy.named_parameters() if "lm_head" not in n]
    assert sum(float(p.grad.abs().sum()) > 0 for p in inner if p.grad is not None) > 10


def quick_method(**settings):
    from postgrad.methods.base import Place
    from postgrad.methods.representation.infonce import InfoNCE, InfoNCESettings

    config = InfoNCESettings(model="tiny", batch_size=4, instruction="Embed:", **settings)
    return InfoNCE(config, Place(0), data=TRIPLES)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, triples_file):
    settings = {"data": {"name": triples_file}, "schedule": "constant", "warmup_steps": 0}
    whole = quick(tmp_path / "whole", steps=4, **settings)
    quick(tmp_path / "cut", steps=2, **settings)
    resumed = api.resume(tmp_path / "cut", steps=4, allow_changes=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    pairs = zip(whole.method.policy.parameters(), resumed.method.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows if "loss" in row]


def test_adapters_leave_the_base_alone(tmp_path):
    run = quick(tmp_path / "run", tune="lora", lora={"rank": 2})
    trained = {n for n, p in run.method.policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_pairs_suffice_without_hard_negatives(tmp_path):
    pairs = [{k: v for k, v in row.items() if k != "negative"} for row in TRIPLES]
    quick(tmp_path / "run", data=pairs, hard_negatives=False)
    with pytest.raises(PostgradError, match="negative"):
        quick(tmp_path / "other", data=pairs)
    with pytest.raises(PostgradError, match="batch_size"):
        quick(tmp_path / "third", data=pairs, hard_negatives=False, batch_size=1)


# sentence-transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
def test_the_saved_model_loads_in_sentence_transformers(template, tmp_path):
    policy: LanguagePolicy = policy_with(template)
    run = quick(tmp_path / "run", model=policy, max_text_tokens=12)
    texts = ["short", "a text of more than twelve tokens", "x"]
    with torch.no_grad():
        expected = run.method.encoder.embed(texts)
    model = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    found = model.encode(texts, convert_to_tensor=True)
    assert torch.allclose(found, expected, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = run.method.encoder.render("x")[None]
    assert torch.allclose(again(ids).logits, policy.network(ids).logits, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template == template
