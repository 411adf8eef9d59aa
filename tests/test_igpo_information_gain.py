"""IGPO: gains, normalisations and returns of turns, the answer's confidence, runs of the method."""

from itertools import pairwise

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.group import group_standardised
from postgrad.advantages.turns import (
    information_gains,
    normalised_turns,
    position_centred,
    spread_turns,
    turn_returns,
    with_outcomes,
)
from postgrad.catalogue import method_class
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.models.language import load_policy
from postgrad.rewards import load_rewards
from postgrad.rewards.confidence import answer_confidence, enclosed

# The worked example: two wrong responses, of three turns and of two
CONFIDENCES = torch.tensor([[0.10, 0.25, 0.40], [0.10, 0.08, 0.0]])
COUNTS = torch.tensor([3, 2])
ONE = torch.zeros(2, dtype=torch.long)
WRONG = torch.zeros(2)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-6, rtol=0)


# Turns -------------------------------------------------------------------------------------------


def test_the_worked_example_joint():
    gains = information_gains(CONFIDENCES, COUNTS)
    close(gains, [[0.15, 0.15, 0.0], [-0.02, 0.0, 0.0]])
    rewards = with_outcomes(gains, WRONG, COUNTS)
    normalised = normalised_turns(rewards, COUNTS, ONE)
    close(normalised, [[1.090507, 1.090507, -0.649664], [-0.881686, -0.649664, 0.0]])
    returns = turn_returns(normalised, COUNTS)
    close(returns, [[1.531350, 0.440843, -0.649664], [-1.531350, -0.649664, 0.0]])


def test_the_worked_example_separate_and_in_logarithms():
    rewards = with_outcomes(information_gains(CONFIDENCES, COUNTS), WRONG, COUNTS)
    normalised = normalised_turns(rewards, COUNTS, ONE, by="separate")
    returns = turn_returns(normalised, COUNTS)
    close(returns, [[1.154689, 0.577344, 0.0], [-1.154689, 0.0, 0.0]])
    gains = information_gains(CONFIDENCES.log(), COUNTS)
    close(gains, [[0.916291, 0.470004, 0.0], [-0.223144, 0.0, 0.0]])


def test_gains_add_up_to_the_last_rise():
    draw = torch.Generator().manual_seed(0)
    confidences = torch.rand(9, 5, generator=draw)
    counts = torch.randint(1, 6, (9,), generator=draw)
    sums = turn_returns(information_gains(confidences, counts), counts)[:, 0]
    last = confidences.gather(1, counts[:, None] - 1)[:, 0]
    torch.testing.assert_close(sums, last - confidences[:, 0])


@pytest.mark.parametrize("by", ["joint", "separate"])
def test_one_turn_is_grpo(by):
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    groups = torch.tensor([3, 3, 3, 8, 8, 8])
    counts = torch.ones(6, dtype=torch.long)
    found = normalised_turns(rewards[:, None], counts, groups, by=by, eps=1e-4)
    torch.testing.assert_close(found[:, 0], group_standardised(rewards, groups))


def test_what_is_alone_or_alike_is_zero():
    # the only gain of its group, and outcomes that are equal
    rewards = torch.tensor([[0.5, 1.0], [1.0, 9.0]])
    found = normalised_turns(rewards, torch.tensor([2, 1]), ONE, by="separate")
    assert found.equal(torch.zeros(2, 2))
    alike = normalised_turns(torch.full((2, 2), 0.3), torch.tensor([2, 2]), ONE)
    assert alike.equal(torch.zeros(2, 2))


def test_discounts():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    counts = torch.tensor([3])
    close(turn_returns(rewards, counts, 0.5), [[3.0, 4.0, 4.0]])
    close(turn_returns(rewards, counts, 0.0), [[1.0, 2.0, 4.0]])
    close(turn_returns(rewards, torch.tensor([2])), [[3.0, 2.0, 0.0]])


def test_tokens_get_the_value_of_their_turn():
    turns = torch.tensor([[0, 0, 1, 2, 0], [0, 1, 0, 0, 0]])
    inside = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    values = torch.tensor([[5.0, 6, 7], [8, 9, 0]])
    spread = spread_turns(values, turns, inside)
    assert spread.tolist() == [[5, 5, 6, 7, 0], [8, 9, 0, 0, 0]]
    centred = position_centred(spread, ONE)
    assert centred.tolist() == [[-1.5, -2, 3, 3.5, 0], [1.5, 2, -3, -3.5, 0]]


def test_wrong_calls_are_refused():
    for call, message in (
        (lambda: information_gains(CONFIDENCES, COUNTS[:1]), "counts"),
        (lambda: information_gains(CONFIDENCES, COUNTS + 1), "1 to 3 turns"),
        (lambda: with_outcomes(CONFIDENCES, WRONG[:1], COUNTS), "outcomes"),
        (lambda: normalised_turns(CONFIDENCES, COUNTS, ONE.float()), "groups must be integer"),
        (lambda: normalised_turns(CONFIDENCES, COUNTS, ONE, by="both"), "by must be"),
        (lambda: turn_returns(CONFIDENCES, COUNTS, 1.5), "gamma"),
        (lambda: spread_turns(CONFIDENCES, ONE[:, None] + 3, ONE[:, None] == 0), "turn 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Confidence --------------------------------------------------------------------------------------


def test_the_answers_tokens_alone_are_counted():
    policy = load_policy("tiny")
    ids, inner = enclosed(policy, "42", "so <a>", "</a>")
    assert policy.decode(ids) == "so <a>42</a>"
    assert policy.decode(ids[inner]) == "42"
    with pytest.raises(ValueError, match="no tokens of its own"):
        enclosed(policy, "", "<a>", "</a>")


def test_confidence_is_the_mean_log_probability_after_each_context():
    policy = load_policy("tiny")
    contexts = [policy.render(text) for text in ("1+1=", "a longer one", "1+1=")]
    answers = [enclosed(policy, text, "<", ">") for text in ("2", "345", "2")]
    found = answer_confidence(policy, contexts, answers)
    with torch.no_grad():
        for context, (ids, inner), confidence in zip(contexts, answers, found, strict=True):
            logits = policy.network(input_ids=torch.cat([context, ids])[None]).logits[0]
            table = logits.log_softmax(-1)[len(context) - 1 : -1]
            own = table.gather(1, ids[:, None])[inner, 0]
            assert float(confidence) == pytest.approx(float(own.mean()), abs=1e-5)
    assert found[0] == found[2]
    assert not found.requires_grad
    assert torch.tensor([-1.2, -0.3, -0.9]).mean().exp().item() == pytest.approx(0.449329, abs=1e-6)


def test_long_lists_are_scored_in_parts(monkeypatch):
    policy = load_policy("tiny")
    contexts = [policy.render("x" * n) for n in range(1, 30)]
    answers = [enclosed(policy, "7")] * 29
    whole = answer_confidence(policy, contexts, answers)
    monkeypatch.setattr("postgrad.rewards.confidence._TOKENS_AT_ONCE", 40)
    torch.testing.assert_close(answer_confidence(policy, contexts, answers), whole)


# The reward --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("<answer>the Red, red fox!</answer>", "red fox", 0.8),
        ("x<answer>no</answer> y <answer>Red fox</answer>", "red fox", 1.0),
        ("<answer>fox</answer>", ["dog", "red fox", "wolf"], 2 / 3),
        ("<answer>cat</answer>", "dog", 0.0),
        ("<answer></answer>", "dog", 0.0),
        ("dog", "dog", -2.0),
        ("<answer>dog", "dog", -2.0),
        ("<answer>a<answer>dog</answer>", "dog", -2.0),
        ("</answer>dog<answer>", "dog", -2.0),
    ],
)
def test_f1(completion, answer, expected):
    rows = [{"prompt": "q", "answer": answer}]
    rewards, _ = load_rewards("f1").of_rows(rows, [completion], [[1]])
    assert rewards == pytest.approx([expected])


# The method --------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"{i:02d}?", "answer": str(i % 7), "table": {c: str(i) for c in "abcdefgh"}}
    for i in range(24)
]
TOOL = {"name": "lookup", "opening": "a", "closing": "e"}
SHORT = {
    "tool": TOOL,
    "batch_size": 4,
    "rollout": {"samples": 6, "max_new_tokens": 60},
    "max_turns": 3,
}


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(rows=ROWS, slug="igpo-information-gain", reward=letters, **config):
    kind = method_class(slug)
    values = {"model": "tiny", **SHORT, **config}
    return kind(validated(kind.Config, values), Place(), data=rows, reward=reward)


@pytest.fixture(scope="module")
def collected():
    method = made()
    return method, method.collect(0)


def test_gains_are_those_of_the_contexts_turn_by_turn(collected):
    method, batch = collected
    several = [i for i in range(len(batch)) if int(batch.turns[i].max()) > 0]
    assert len(several) > 2
    for i in several:
        turns = batch.turns[i][: len(batch.responses[i])]
        answer = method.answers[int(batch.row[i])]
        probabilities = []
        for turn in range(int(turns.max()) + 1):
            context = torch.cat([batch.prompts[i], batch.responses[i][turns < turn]])
            confidence = answer_confidence(method.policy, [context], [answer])
            probabilities.append(float(confidence.exp()))
        gains = [after - before for before, after in pairwise(probabilities)]
        found = batch.turn_rewards[i, : len(gains) + 1].tolist()
        assert found == pytest.approx([*gains, 0.0], abs=1e-7)


def test_the_true_answer_is_in_no_rollout(collected):
    method, batch = collected
    opening = method.config.answer_opening
    assert not any(opening in method.policy.decode(ids) for ids in batch.responses)


def test_every_token_of_a_turn_has_its_advantage(collected):
    method, batch = collected
    for row, mask, turns in zip(batch.advantages, batch.mask, batch.turns, strict=True):
        for turn in range(int(turns.max()) + 1):
            assert len(set(row[mask & (turns == turn)].tolist())) <= 1
    loss, _ = method.loss(batch)
    assert loss.requires_grad
    assert not batch.advantages.requires_grad
    metrics = method.describe_batch(batch)
    assert 1 < metrics["turns"] < 3
    assert 0 <= metrics["advantage/silent_groups"] <= 1


def test_without_gains_and_calls_it_is_grpo():
    never = {"tool": {**TOOL, "opening": "@@@@"}}
    own = made(**never, advantage={"name": "turns", "eps": 1e-4}).collect(0)
    other = made(slug="grpo", **never).collect(0)
    assert own.texts == other.texts
    torch.testing.assert_close(
        own.advantages[own.mask], (other.advantages[:, None] * other.mask)[own.mask]
    )


@pytest.mark.parametrize("normalise", ["joint", "separate", "position"])
@pytest.mark.parametrize("gain", ["prob", "logprob"])
def test_equal_outcomes_still_teach(normalise, gain):
    method = made(
        reward=lambda completions: [0.0] * len(completions),
        gain=gain, advantage={"name": "turns", "normalise": normalise},
    )  # fmt: skip
    batch = method.collect(0)
    metrics = method.describe_batch(batch)
    assert metrics["reward/degenerate_groups"] == 1
    assert metrics["advantage/silent_groups"] < 1
    assert bool(torch.isfinite(batch.advantages).all())


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes("igpo-information-gain", tmp_path, data=data, **SMALL, **SHORT)


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (ROWS, {"tool": "none"}, "tool: igpo.* rewards the turns .*'none'"),
        ([{**ROWS[0], "answer": " "}], {}, "row 1: answer: expected the true answer"),
        ([{**ROWS[0], "answer": []}], {}, "row 1: answer: expected the true answer"),
        ([{"prompt": "1?", "table": {}}], {}, "row 1: answer: expected the true answer"),
        (ROWS, {"rollout": {"samples": 1, "max_new_tokens": 60}}, "rollout.samples: .* at least 2"),
        (ROWS, {"rollout": {"samples": 4, "max_new_tokens": 1000}}, "max_new_tokens: expected at"),
        (ROWS, {"gain": "logit"}, "gain"),
        ([{"prompt": "1?", "answer": "1"}], {"tool": "lookup"}, "tool.column: expected a table"),
    ],
)
def test_faults_give_one_line(rows, config, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(rows, **config).collect(0)
    assert "\n" not in str(caught.value)
