"""SALSA: the soup of two models as PPO's reference, to printed digits and on the tiny model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from language_runs import SMALL, assert_resumes, final_weights, untimed, write_rows
from postgrad.api import prepare, train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.salsa import SALSA, require_alike
from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.language import LanguagePolicy, LoraSettings, load_policy
from postgrad.models.snapshots import Snapshot, soup
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 8,
    "epochs": 2,
    "minibatches": 2,
    "rollout": {"samples": 1, "max_new_tokens": 6},
    "frontier": {"max_new_tokens": 6},
}
REWARD = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]
"""


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]


def related(size=0.02):
    """A model near `tiny`, as one that was fine-tuned from it would be."""
    policy = load_policy("tiny")
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=random))
    return policy


def made(second=None, **config):
    values = {"model": "tiny", **SHORT, **config}
    return SALSA(validated(SALSA.Config, values), Place(), data=ROWS, reward=vowels,
                 second=second or related())  # fmt: skip


def scores(policy, batch):
    return policy.score(batch.prompts, batch.responses).logprobs.detach()


# Soups ---------------------------------------------------------------------------------------

FIRST = torch.tensor([[1, 0], [0, 1], [0.5, -0.5]], dtype=torch.float64)
SECOND = torch.tensor([[0, 1], [1, 0], [-0.5, 1.5]], dtype=torch.float64)


def log_policy(share):
    mixed = soup([{"w": FIRST}, {"w": SECOND}], [share, 1 - share])["w"]
    return (mixed @ torch.tensor([1.0, 2.0], dtype=torch.float64)).log_softmax(0)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, (-1.371539, -0.371539, -2.871539)),
        (0.5, (-0.958020, -0.958020, -1.458020)),
        (0.25, (-0.958020, -1.458020, -0.958020)),
        (0.0, (-1.104131, -2.104131, -0.604131)),
    ],
)
def test_the_worked_soups(share, expected):
    assert log_policy(share).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_soup_of_log_linear_policies_is_their_geometric_mean():
    for share in (0.25, 0.5):
        mean = (share * log_policy(1.0) + (1 - share) * log_policy(0.0)).log_softmax(0)
        assert log_policy(share).tolist() == pytest.approx(mean.tolist(), abs=1e-6)


def test_the_worked_divergences():
    policy = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)

    def divergence(share):
        return float((policy * (policy.log() - log_policy(share))).sum())

    assert divergence(1.0) == pytest.approx(0.323593, abs=1e-6)
    assert divergence(0.5) == pytest.approx(0.110074, abs=1e-6)


def test_a_soup_is_the_same_from_either_side():
    there = soup([{"w": FIRST}, {"w": SECOND}], [0.3, 0.7])["w"]
    back = soup([{"w": SECOND}, {"w": FIRST}], [0.7, 0.3])["w"]
    torch.testing.assert_close(there, back)


# The method ----------------------------------------------------------------------------------


def test_the_reference_is_the_soup_and_the_policy_starts_at_the_first():
    second = related()
    method = made(second, share=0.3)
    batch = method.collect(0)
    mixed = load_policy("tiny")
    weights = [dict(policy.named_parameters()) for policy in (load_policy("tiny"), second)]
    with torch.no_grad():
        mixed.load_state_dict(soup(weights, [0.3, 0.7]), strict=False)
    torch.testing.assert_close(batch.reference_logprobs, scores(mixed, batch))
    torch.testing.assert_close(batch.old_logprobs, scores(load_policy("tiny"), batch))
    fields = batch.fields()
    assert fields["kl/first"].tolist() == [0.0] * 8
    from_second = (batch.old_logprobs - scores(second, batch)).sum(1)
    torch.testing.assert_close(fields["kl/second"], from_second, atol=1e-5, rtol=1e-4)
    metrics = method.describe_batch(batch)
    from_soup = (batch.old_logprobs - batch.reference_logprobs).sum(1).mean()
    assert metrics["kl"] == pytest.approx(float(from_soup))
    assert metrics["kl"] != 0
    assert metrics["kl/first"] == 0
    assert metrics["kl/second"] == pytest.approx(float(from_second.mean()), rel=1e-4)


def test_from_the_soup_the_divergence_from_it_is_zero_at_first():
    method = made(start="soup")
    batch = method.collect(0)
    metrics = method.describe_batch(batch)
    assert metrics["kl"] == 0
    assert metrics["kl/first"] != 0
    # the critic starts from the first model's body in both cases
    critics = [dict(m.critic.named_parameters()) for m in (method, made())]
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in critics[1])


def test_the_two_models_stay_as_they_were_while_the_policy_learns():
    second = related()
    method = made(second)
    loop = LoopSettings(learning_rate=1e-2)
    optimise = Optimisers(method.modules(), loop, torch.device("cpu"))
    method.update(method.collect(0), optimise)
    batch = method.collect(1)
    fields = batch.fields()
    for name, policy in (("first", load_policy("tiny")), ("second", second)):
        divergence = (batch.old_logprobs - scores(policy, batch)).sum(1)
        torch.testing.assert_close(fields[f"kl/{name}"], divergence, atol=1e-4, rtol=1e-4)
    assert fields["kl/first"].abs().max() > 0.1


@pytest.mark.parametrize("case", ["all of the first", "two equal models"])
def test_it_is_ppo_where_the_soup_is_the_first_model(case, tmp_path):
    own = {**SMALL, **SHORT, "steps": 3, "kl_coefficient": 0.1}
    second, share = (related(), 1.0) if case == "all of the first" else (load_policy("tiny"), 0.5)
    train("salsa", data=ROWS, reward=vowels, second=second, share=share,
          output=tmp_path / "salsa", **own)  # fmt: skip
    train("ppo-language", data=ROWS, reward=vowels, output=tmp_path / "ppo", **own)
    first, expected = final_weights(tmp_path / "salsa"), final_weights(tmp_path / "ppo")
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    more = {"kl/first", "kl/second"}
    kept = [{k: v for k, v in row.items() if k not in more} for row in untimed(tmp_path / "salsa")]
    assert kept == untimed(tmp_path / "ppo")


def test_tied_embeddings_stay_tied(tmp_path):
    method = made(start="soup")
    embedding = method.policy.network.get_input_embeddings().weight
    assert method.policy.network.get_output_embeddings().weight is embedding
    with method.policy.reference():
        frozen = method.policy._network()
    assert frozen.get_output_embeddings().weight is frozen.get_input_embeddings().weight
    method.save(tmp_path)
    again = load_policy(str(tmp_path))
    own, other = Snapshot(method.policy).weights, Snapshot(again).weights
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_it_learns(tmp_path):
    train(
        "salsa",
        data=ROWS * 8,
        reward=vowels,
        second=related(),
        output=tmp_path,
        **{
            **SMALL,
            **SHORT,
            "steps": 12,
            "batch_size": 32,
            "minibatches": 1,
            "epochs": 4,
            "learning_rate": 3e-3,
            "critic_rate": 1.0,
            "kl_coefficient": 0.001,
        },
    )
    rewards = [row["reward"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.45


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    related().save(tmp_path / "second")
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{reward}:vowels",
        "second": tmp_path / "second",
        "start": "soup",
    }
    assert_resumes("salsa", tmp_path, **settings)


# Faults --------------------------------------------------------------------------------------


def refused(tmp_path, message, **config):
    with pytest.raises(PostgradError, match=message) as caught:
        train("salsa", data=ROWS, reward=vowels, output=tmp_path / "run", **{**SMALL, **config})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "second: expected a folder or the Hub id of a model, got nothing"),
        ({"second": "./nowhere"}, "second: .*nowhere"),
        ({"second": "tiny", "tune": "lora"}, "tune: salsa averages weights.*expected full"),
        ({"second": "tiny", "share": 1.1}, "share: .*less than or equal to 1"),
        ({"second": "tiny", "share": -0.1}, "share: .*greater than or equal to 0"),
        ({"second": "tiny", "start": "second"}, "start: .*'first' or 'soup'"),
    ],
)
def test_a_bad_setting_is_named(config, message, tmp_path):
    refused(tmp_path, message, **config)


def test_a_policy_with_an_adapter_is_refused(tmp_path):
    adapted = load_policy("tiny", tune="lora", lora=LoraSettings(rank=2, alpha=4))
    refused(tmp_path, "tune: salsa averages weights", model=adapted, second=related())


def test_another_vocabulary_is_refused(tmp_path):
    other = related()
    other.tokenizer.add_tokens(["<other>"])
    refused(tmp_path, "second: .* has another vocabulary than the model tiny", second=other)


def test_another_architecture_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    other = LanguagePolicy(GPT2LMHeadModel(config), tokenizer)
    refused(tmp_path, "second: expected the architecture of model, but second has no weights",
            second=other)  # fmt: skip


def test_other_shapes_and_numbers_are_refused():
    one = {"w": torch.zeros(2, 3)}
    with pytest.raises(PostgradError, match=r"whose w is \[2, 3\], found \[3, 3\]"):
        require_alike(one, {"w": torch.zeros(3, 3)})
    with pytest.raises(PostgradError, match="but model has no weights v"):
        require_alike(one, {"w": torch.zeros(2, 3), "v": torch.zeros(1)})
    with pytest.raises(PostgradError, match=r"second: expected floating-point weights .*int8"):
        require_alike(one, {"w": torch.zeros(2, 3, dtype=torch.int8)})


def test_a_soup_that_is_worse_than_both_is_refused(tmp_path):
    """Two networks that were never one: their mean says nothing about what both learnt."""
    demonstrations = [{"prompt": row["prompt"], "completion": "aeiou"} for row in ROWS]
    both = []
    for seed in (0, 1):
        settings = {**SMALL, "learning_rate": 3e-3, "steps": 25, "seed": seed}
        run = train("sft", data=demonstrations, output=tmp_path / str(seed), **settings)
        both.append(run.method.policy)
    config = {"second": both[1], "soup_data": demonstrations}
    refused(tmp_path, "second: the soup's loss on soup_data is .* 0.05 above the worse",
            model=both[0], **config)  # fmt: skip
    # a model and itself: the soup is as good
    same = {**config, "second": both[0], "model": both[0]}
    values = {key: value for key, value in SMALL.items() if key != "model"}
    method, _ = prepare("salsa", data=ROWS, reward=vowels, **values, **same)
    assert method.config.soup_tolerance == 0.05
