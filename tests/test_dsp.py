"""DSP: what a stimulus is worth, which tokens may be drawn, and real runs against a black box."""

import copy

import pytest
import torch

from language_runs import SMALL, assert_same_run, write_rows
from postgrad.advantages.group import batch_standardised
from postgrad.advantages.temporal import token_advantages
from postgrad.api import resume, train
from postgrad.batch import Batch
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.actor_critic import ActorCritic, at_last_token
from postgrad.methods.language.rlhf.dsp import DSP
from postgrad.models.language import load_policy
from postgrad.rewards import load_rewards
from postgrad.rewards.overlap import keyword_rewards, rouge
from postgrad.sampling.drawing import SamplingSettings
from postgrad.sampling.generation import generate
from postgrad.sampling.mixture import ActionMask
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter, "answer": "aeiou"} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 8,
    "epochs": 2,
    "minibatches": 2,
    "rollout": {"samples": 1, "max_new_tokens": 6, "top_k": 0},
    "frontier": {"max_new_tokens": 6},
    "answers": 2,
}
REWARD = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]
"""


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]


def echo(prompts, n=1, **options):
    """Says the stimulus; a real stand-in that needs no model."""
    return [[prompt.split("Hint: ", 1)[1] + "!"] * n for prompt in prompts]


def made(kind=DSP, *, black_box=echo, data=ROWS, reward=vowels, **config):
    values = {"model": "tiny", **SHORT, **config}
    if kind is ActorCritic:
        values.pop("answers")
        return kind(validated(kind.Config, values), Place(), data=data, reward=reward)
    config = validated(kind.Config, values)
    return kind(config, Place(), data=data, reward=reward, black_box=black_box)


# What a stimulus is worth -------------------------------------------------------------------


def test_keywords_of_the_worked_example():
    found = keyword_rewards(["court", " apple", " court"], "The Court decided.")
    assert found == [1.0, -0.2, -0.2]
    assert keyword_rewards([], "The court") == []


def test_keywords_are_whole_words_unless_told_otherwise():
    assert keyword_rewards(["art", "the start", "c++"], "The start of C++.") == [-0.2, 1, 1]
    assert keyword_rewards(["art"], "The start", whole_words=False) == [1]
    assert keyword_rewards(["", " ", "The", "of"], "the of", stop_words=["Of"], miss=0.5) == [
        -0.5, -0.5, 1, -0.5
    ]  # fmt: skip
    with pytest.raises(ValueError, match="miss must be at least 0"):
        keyword_rewards(["a"], "a", miss=-0.2)


def test_rouge_by_hand():
    found = rouge("the cat sat", "The cat, it sat down.")
    assert found == pytest.approx({"rouge1": 2 * 3 / 8, "rouge2": 2 * 1 / 6, "rougeL": 2 * 3 / 8})
    assert rouge("b a", "a b") == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.5}
    assert rouge("", "a b") == rouge("a", "") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert rouge("a a a", "a b") == pytest.approx({"rouge1": 0.4, "rouge2": 0, "rougeL": 0.4})
    values, _ = load_rewards("rouge")(["p"], ["the cat sat"], {"answer": ["the cat it sat down"]})
    assert values == pytest.approx([(0.75 + 1 / 3 + 0.75) / 3])
    (values, _) = load_rewards({"name": "rouge", "kind": "rouge2"})(
        ["p"], ["a b"], {"answer": ["a b"]}
    )
    assert values == [1.0]
    with pytest.raises(PostgradError, match="did you mean 'rouge1'"):
        load_rewards({"name": "rouge", "kind": "rouge11"})


def of_texts(method, texts, rows=None):
    """The batch of given stimuli, as far as rewards need it."""
    rows = rows or [ROWS[0]] * len(texts)
    responses = [method.policy.encode_response(text) for text in texts]
    step_rewards = method._step_rewards(rows, responses)
    mask = torch.arange(step_rewards.shape[1]) < torch.tensor([len(r) for r in responses])[:, None]
    zeros = torch.zeros(mask.shape)
    return Batch(
        responses=responses,
        mask=mask,
        step_rewards=step_rewards,
        old_logprobs=zeros,
        reference_logprobs=zeros,
        finished=torch.ones(len(texts), dtype=torch.bool),
        reward=torch.zeros(len(texts)),
    )


def test_the_reward_of_the_worked_example():
    """ROUGE of four answers averages 0.29, c_LLM is 10, the keywords earn +1, -0.2, -0.2."""
    means = iter([0.30, 0.26, 0.28, 0.32])
    method = made(answers=4, reward=lambda completions: [next(means) for _ in completions])
    rows = [{"prompt": "a", "answer": "the court said"}]
    answers = method._answered(rows, ["court; apple; court;"])
    worth = method.config.answer_scale * answers["answer"]
    assert worth.tolist() == pytest.approx([2.9])
    batch = of_texts(method, ["court; apple; court;"], rows).with_fields(reward=worth)
    assert float(method.token_rewards(batch).sum()) == pytest.approx(3.5, abs=1e-5)


def test_a_keyword_earns_at_the_token_that_ends_it():
    method = made(data=[{"prompt": "a", "answer": "ab cd"}] * 8)
    batch = of_texts(method, ["ab;cd;xy", ";ab;ab;", "ab"], [method.data.rows[0]] * 3)
    # the last keyword has no delimiter after it and earns nothing
    assert batch.step_rewards[0].tolist() == pytest.approx([0, 0, 1, 0, 0, 1, 0, 0, 0])
    assert batch.step_rewards[1].tolist() == pytest.approx([-0.2, 0, 0, 1, 0, 0, -0.2, 0, 0])
    assert not batch.step_rewards[2].any()
    halved = made(step_reward=0.5)
    assert float(halved.token_rewards(of_texts(halved, ["x;"])).sum()) == pytest.approx(-0.1)


def test_a_delimiter_may_be_part_of_a_token():
    pieces = {0: "a", 1: " b; c", 2: ";;", 3: "d"}

    class Words:
        def decode(self, ids):
            return "".join(pieces[i] for i in ids.tolist())

    method = made()
    method.policy = Words()
    assert method._keywords(torch.tensor([0, 1, 3, 2, 3])) == [(1, "a b"), (3, " cd"), (3, "")]


def test_answers_are_averaged_and_empty_ones_count_nothing():
    told = []

    def half(prompts, n=1, **options):
        told.append((prompts, n, options))
        return [["aaa"] + [""] * (n - 1) for _ in prompts]

    method = made(
        black_box=half, answer_tokens=7, answer_temperature=0.3, answer_stop=["."], answer_scale=2
    )
    rows = [{"prompt": "x", "answer": "a"}, {"prompt": "y", "answer": "a"}]
    terms = method._answered(rows, ["one", "two"])
    assert terms["answer"].tolist() == [0.25, 0.25]  # of 3/6 and 0
    assert terms["empty"].tolist() == [0.5, 0.5]
    options = {"max_tokens": 7, "temperature": 0.3, "stop": ["."], "seed": 0}
    assert told == [(["x\n\nHint: one", "y\n\nHint: two"], 2, options)]
    with pytest.raises(PostgradError, match=r"2 of 4 answers are empty, more than empty_limit=0.4"):
        made(black_box=half, empty_limit=0.4)._answered(rows, ["one", "two"])


def test_a_black_box_that_does_not_listen_gives_no_direction():
    """Whatever the stimulus, a constant answer: one reward for all."""
    method = made(black_box=lambda prompts, n=1, **_: [["aaa"] * n for _ in prompts],
                  step_reward=0.0, kl_coefficient=0.0, kl_target=None, discount=1.0)  # fmt: skip
    batch = method.collect(0)
    assert len(set(batch.texts)) > 4
    assert batch.reward.unique().tolist() == pytest.approx([5.0])
    last = batch.mask.sum(1) - 1
    returns = batch.returns[torch.arange(8), last]
    torch.testing.assert_close(returns, torch.full((8,), 5.0))


def test_a_constant_added_to_the_metric_leaves_whitened_advantages_unchanged():
    mask = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    zeros = torch.zeros(mask.shape)
    worth = torch.tensor([1.0, 3.0, -2.0])

    def whitened(worth):
        rewards = at_last_token(worth, mask)
        advantages, _ = token_advantages(rewards, zeros, mask, discount=1.0, lambda_=1.0)
        return batch_standardised(advantages, mask)

    torch.testing.assert_close(whitened(worth + 10), whitened(worth))


def test_without_scales_only_the_kl_is_left():
    method = made(answer_scale=0.0, step_reward=0.0, kl_coefficient=0.5)
    batch = of_texts(method, ["ab;c"])
    batch = batch.with_fields(
        reference_logprobs=torch.full(batch.mask.shape, -1.0), reward=torch.zeros(1)
    )
    torch.testing.assert_close(method.token_rewards(batch), -0.5 * torch.ones(batch.mask.shape))
    found = method.collect(0)
    assert (found.reward == 0).all()


def test_the_divergence_is_of_a_token():
    method = made()
    batch = Batch(
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        old_logprobs=torch.tensor([[-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]),
        reference_logprobs=torch.tensor([[-2.0, -2.0, -2.0], [-1.6, 0.0, 0.0]]),
    )
    assert method.divergence(batch) == pytest.approx(0.9)
    method.kl_coefficient.update(method.divergence(batch))
    assert method.kl_coefficient.value == pytest.approx(0.005100, abs=1e-9)


# Which tokens may be drawn ------------------------------------------------------------------


def test_the_mask_is_the_nucleus_with_the_token_that_crosses_the_mass():
    judged = torch.tensor([[0.05, 0.5, 0.3, 0.15]]).log()
    logits = torch.zeros(1, 4)
    policy = load_policy("tiny")

    def allowed(**settings):
        masked = ActionMask(policy, **settings).apply(logits, judged)
        assert float(masked.softmax(-1).sum()) == pytest.approx(1)
        return masked.isfinite().tolist()[0]

    assert allowed(mass=0.4) == [False, True, False, False]
    assert allowed(mass=0.6) == [False, True, True, False]
    assert allowed(mass=0.4, least=3) == [False, True, True, True]
    assert allowed(mass=0.4, always=frozenset({0})) == [True, True, False, False]
    assert allowed(mass=1.0) == [True] * 4
    for wrong in ({"mass": 0.0}, {"mass": 1.1}, {"least": 0}):
        with pytest.raises(ValueError, match="mass must lie"):
            ActionMask(policy, **wrong)


def test_what_the_mask_excludes_is_not_drawn():
    policy, other = load_policy("tiny"), load_policy("tiny", seed=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)  # sharper, so that its nucleus is small
    prompts = [policy.render(letter) for letter in "abcd"]
    mask = ActionMask(other, 0.5)
    settings = SamplingSettings(6)
    found = generate(policy, prompts, settings, samples=8, seeds=range(32), mask=mask)
    for prompt, response, logprobs in zip(
        found.prompts, found.responses, found.logprobs, strict=True
    ):
        for place in range(len(response)):
            ids = torch.cat([prompt, response[:place]])[None]
            with torch.no_grad():
                own, judged = (p.network(input_ids=ids).logits[:, -1] for p in (policy, other))
            masked = mask.apply(own, judged).log_softmax(-1)[0, response[place]]
            assert float(masked) == pytest.approx(float(logprobs[place]), abs=1e-4)
    free = generate(policy, prompts, settings, samples=8, seeds=range(32))
    assert free.texts != found.texts


def test_a_copy_without_lag_leaves_the_likeliest_token():
    policy = load_policy("tiny")
    prompts = [policy.render(letter) for letter in "abcd"]
    settings = SamplingSettings(6, temperature=0)
    mask = ActionMask(copy.deepcopy(policy), 0.1)
    masked = generate(policy, prompts, settings, seeds=range(4), mask=mask)
    plain = generate(policy, prompts, settings, seeds=range(4))
    assert masked.texts == plain.texts


def test_without_mask_and_keywords_it_is_ppo_on_the_black_boxs_reward():
    plain = made(
        ActorCritic,
        reward=lambda completions: [10 * v for v in vowels(completions)],
        **{"kl_coefficient": 0.005, "kl_target": 0.5, "discount": 0.99},
    )
    method = made(top_mask=1.0, step_reward=0.0)
    first, second = plain.collect(0), method.collect(0)
    assert second.texts == first.texts
    for name in ("reward", "old_logprobs", "token_rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name))
    assert torch.equal(plain.loss(first)[0], method.loss(first)[0])


# Real runs ----------------------------------------------------------------------------------


def test_it_learns(tmp_path):
    train(
        "dsp",
        data=ROWS * 8,
        eval_data=ROWS,
        reward=vowels,
        black_box=echo,
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
            "step_reward": 0.0,
            "least_tokens": 1,
            "mask_every": 2,
            "kl_target": None,
        },
    )
    rows = read_rows(tmp_path / "metrics.jsonl")
    scores = [row["reward/answer"] for row in rows if "reward/answer" in row]
    assert sum(scores[-3:]) > sum(scores[:3]) + 0.45


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    """With a model as the black box; the lagged copy is two steps behind where it goes on."""
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    settings = {
        **SMALL,
        **SHORT,
        "learning_rate": 1e-2,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{reward}:vowels",
        "black_box": "tiny",
        "answer_tokens": 4,
        "least_tokens": 1,
        "top_mask": 0.3,
        "mask_every": 2,
    }
    train("dsp", steps=5, output=tmp_path / "whole", **settings)
    train("dsp", steps=3, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=5, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_evaluations_judge_stimuli_by_the_answers_to_them(tmp_path):
    settings = {**SMALL, **SHORT, "steps": 1, "least_tokens": 1}
    heard = []

    def shout(prompts, n=1, **options):
        heard.extend(prompts)
        return [["aaa"] * n for _ in prompts]

    run = train("dsp", data=ROWS, eval_data=ROWS, reward=vowels, black_box=shout,
                output=tmp_path, **settings)  # fmt: skip
    assert run.evaluation["reward"] == pytest.approx(0.5)
    assert all("\n\nHint: " in prompt for prompt in heard)


def test_the_copy_follows_every_so_many_steps():
    method = made(mask_every=2, least_tokens=1)
    batch = method.collect(0)
    names = [name for name, _ in method.policy.named_parameters()]
    lagged = dict(method._mask.policy.named_parameters())

    def optimise(loss, part, module):
        with torch.no_grad():
            for parameter in method.policy.parameters():
                parameter.add_(0.01)
        return {"loss": 0.0, "gradient_norm": 0.0}

    def follows():
        now = dict(method.policy.named_parameters())
        return all(torch.equal(now[name], lagged[name]) for name in names)

    assert follows()
    method.update(batch, optimise)
    assert not follows()
    method.update(batch.with_fields(step=batch.step + 1), optimise)
    assert follows()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"template": "{prompt}"}, "template: expected {stimulus}"),
        ({"template": "{story}: {stimulus}"}, "template: {story} is no column of texts .*answer"),
        ({"template": "{stimulus} {"}, "template: .*write {{ and }}"),
        ({"reference": "summary"}, "reference: rows has no column 'summary'"),
        ({"answers": 0}, "answers: .*greater than 0, got 0"),
        ({"kl_target": -0.5}, "kl_target: .*greater than 0"),
    ],
)
def test_faults(config, problem):
    with pytest.raises(PostgradError, match=problem):
        made(**config)


def test_a_black_box_that_fails_stops_the_run():
    method = made(black_box=lambda prompts, n, **_: 1 / 0)
    with pytest.raises(PostgradError, match="black_box raised ZeroDivisionError"):
        method.check()
    method = made(black_box=lambda prompts, n, **_: [["a"]] * len(prompts))
    with pytest.raises(PostgradError, match="expected 2 answers to each of 8 prompts"):
        method.collect(0)
