"""Text2Grad: token rewards from critiques, on real runs of the tiny model."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.advantages.group import batch_standardised
from postgrad.advantages.temporal import token_advantages
from postgrad.api import train
from postgrad.batch import Batch
from postgrad.claims import text2grad as claim
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import NothingToLearn, Place
from postgrad.methods.language.rlhf.actor_critic import ActorCritic, at_last_token
from postgrad.methods.language.rlhf.text2grad import Text2Grad
from postgrad.rewards.critiques import load_critique
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 8,
    "epochs": 2,
    "minibatches": 2,
    "rollout": {"samples": 1, "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0},
    "frontier": {"max_new_tokens": 6},
}
CRITIQUE = """
def critique(completions):
    return [
        [(i, i + 1, 1 if letter in "aeiou" else -1) for i, letter in enumerate(text)]
        for text in completions
    ]
"""


def critique(completions):
    """Vowels are good, all else is poor."""
    return [
        [(i, i + 1, 1 if letter in "aeiou" else -1) for i, letter in enumerate(text)]
        for text in completions
    ]


def made(critique=critique, **config):
    values = {"model": "tiny", **SHORT, **config}
    return Text2Grad(validated(Text2Grad.Config, values), Place(), data=ROWS, critique=critique)


def row(*values):
    return torch.tensor([values])


DELTA = row(0.0, 1.0, -1.0, 0.0)
KL = row(0.1, 0.05, 0.2, 0.0)
VALUES = row(0.1, 0.2, 0.0, -0.1)
MASK = torch.ones(1, 4, dtype=torch.bool)


def batch_of(**fields):
    return Batch(
        mask=MASK,
        old_logprobs=KL - 1,
        reference_logprobs=row(-1.0, -1.0, -1.0, -1.0),
        finished=torch.tensor([True]),
        **fields,
    )


def test_the_worked_example():
    """beta 0.2, gamma 1, lambda 0.95."""
    found = made(kl_coefficient=0.2, kl_target=None)
    rewards = found.token_rewards(batch_of(deltas=DELTA))
    torch.testing.assert_close(rewards, row(-0.02, 0.99, -1.04, 0.0))
    how = {"discount": 1.0, "lambda_": 0.95}
    advantages, returns = token_advantages(rewards, VALUES, MASK, **how)
    expected = row(-0.112613, -0.202750, -1.045000, 0.100000)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    expected = row(-0.012613, -0.002750, -1.045000, 0.0)
    torch.testing.assert_close(returns, expected, atol=1e-6, rtol=0)
    whitened = batch_standardised(advantages, MASK)
    expected = row(0.402632, 0.223391, -1.451438, 0.825415)
    torch.testing.assert_close(whitened, expected, atol=1e-6, rtol=0)


def test_as_one_number_at_the_end_the_poor_token_is_not_singled_out():
    rewards = at_last_token(DELTA.sum(1), MASK) - 0.2 * KL
    advantages, _ = token_advantages(rewards, VALUES, MASK, discount=1.0, lambda_=0.95)
    expected = row(-0.160113, -0.252750, -0.045000, 0.100000)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)


def test_a_score_at_the_last_token_alone_is_ppo():
    worth = torch.tensor([3.0])
    own = made(missing_end_penalty=1.0)
    plain = ActorCritic(own.config, Place(), data=ROWS, reward=lambda completions: [0.0])
    batch = batch_of(deltas=at_last_token(worth, MASK), reward=worth)
    assert own.token_rewards(batch).equal(plain.token_rewards(batch))
    cut = batch.with_fields(finished=torch.tensor([False]))
    assert own.token_rewards(cut)[0, -1] == own.token_rewards(batch)[0, -1] - 1
    torch.testing.assert_close(own.token_rewards(cut), plain.token_rewards(cut))


def test_without_discount_value_and_kl_its_gradient_is_the_natural_language_gradient():
    """sum_t delta_t grad log pi(y_t), over the number of tokens."""
    found = made(
        kl_coefficient=0.0, discount=1e-9, gae_lambda=0.0, standardise=False, epochs=1,
        minibatches=1,
    )  # fmt: skip
    batch = found.collect(0)
    torch.testing.assert_close(batch.advantages, batch.deltas)
    assert {-1.0, 1.0} <= set(batch.deltas[batch.mask].tolist())
    value, _ = found.loss(batch)
    value.backward()
    own = {name: p.grad.clone() for name, p in found.policy.named_parameters()}
    found.policy.zero_grad()
    logprobs = found.policy.score(batch.prompts, batch.responses).logprobs
    (-(batch.deltas * logprobs)[batch.mask].sum() / batch.tokens).backward()
    for name, parameter in found.policy.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_scores_stand_at_their_tokens():
    batch = made().collect(0)
    for i, text in enumerate(batch.texts):
        ids = batch.responses[i].tolist()
        letters = [1 if letter in "aeiou" else -1 for letter in text if letter.strip()]
        scores = batch.deltas[i][batch.mask[i]].tolist()
        assert len(scores) == len(ids)
        assert [score for score in scores if score] == letters
    assert (batch.deltas[~batch.mask] == 0).all()
    assert batch.reward.equal(batch.deltas.sum(1))


def test_the_whole_divergence_is_that_of_all_logits():
    found = moved(made(kl_estimate="full", kl_coefficient=0.5, kl_target=None))
    batch = found.collect(0)
    i = int(batch.mask.sum(1).argmax())
    ids = torch.cat([batch.prompts[i], batch.responses[i]])[None]
    size = len(batch.prompts[i])
    with torch.no_grad():
        own = found.policy.network(ids).logits[0, size - 1 : -1].log_softmax(-1)
        with found.policy.reference():
            reference = found.policy._network()(ids).logits[0, size - 1 : -1].log_softmax(-1)
    expected = (own.exp() * (own - reference)).sum(-1)
    assert float(expected.min()) > 1e-3
    penalty = found.kl_penalty(batch)
    torch.testing.assert_close(penalty[i][batch.mask[i]], 0.5 * expected, rtol=1e-3, atol=1e-5)
    assert (penalty[~batch.mask] == 0).all()
    found.policy.sharing = "plain: as an architecture that cannot share prompts"
    torch.testing.assert_close(found.kl_penalty(batch), penalty, rtol=1e-3, atol=1e-5)


def sparing(completions):
    """Every third completion has no critique."""
    judged = critique(completions)
    return [None if i % 3 == 0 else said for i, said in enumerate(judged)]


def test_responses_without_a_critique_are_dropped():
    method = made(sparing)
    batch = method.collect(0)
    assert batch.group.tolist() == [1, 2, 4, 5, 7]
    assert method.describe_batch(batch)["critique/failed"] == pytest.approx(3 / 8)
    assert batch.texts == [made().collect(0).texts[i] for i in (1, 2, 4, 5, 7)]


def test_a_step_with_too_few_critiques_is_passed_over(tmp_path):
    with pytest.raises(NothingToLearn, match="3 of 8 critiques failed"):
        made(sparing, fewest_critiques=0.7).collect(0)
    train(
        "text2grad",
        data=ROWS,
        critique=lambda completions: [None] * len(completions),
        output=tmp_path / "run",
        **{**SMALL, **SHORT, "steps": 2},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["passed_over"] for row in rows if "passed_over" in row] == [1.0, 1.0]


def test_too_many_quotes_that_are_nowhere_stop_the_run():
    def invents(completions):
        return [[("no such words", 1), (0, 1, 1)] if text else [] for text in completions]

    with pytest.raises(
        PostgradError, match=r"critique: 5\d% of the spans are not in the responses"
    ):
        made(invents, most_skipped=0.4).collect(0)
    method = made(invents, most_skipped=0.8)
    facts = method.describe_batch(method.collect(0))
    assert 0.5 <= facts["critique/skipped_spans"] <= 0.6


def test_scores_fade_behind_the_first():
    batch = made(fading_length=2.0, fading_sharpness=6.0).collect(0)
    first = batch.deltas[:, 0].abs()
    assert float(first[first > 0].min()) == pytest.approx(1, abs=1e-3)
    assert float(batch.deltas[:, 5].abs().max()) < 0.01


def test_it_learns(tmp_path):
    train(
        "text2grad",
        data=ROWS * 8,
        critique=critique,
        output=tmp_path,
        **{
            **SMALL,
            **SHORT,
            "steps": 10,
            "batch_size": 32,
            "minibatches": 1,
            "epochs": 4,
            "learning_rate": 3e-3,
            "critic_rate": 1.0,
            "kl_coefficient": 0.0,
            "kl_target": None,
        },
    )
    rewards = [row["reward"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 5
    shown = read_rows(tmp_path / "samples.jsonl")
    assert any(line.startswith(("+1 ", "-1 ")) for line in shown[0]["critique"].splitlines())


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "own.py").write_text(CRITIQUE)
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_rows(tmp_path / "held.jsonl", ROWS),
        "critique": f"{tmp_path / 'own.py'}:critique",
        "evaluate_every": 2,
        "kl_target": 0.1,
    }
    assert_resumes("text2grad", tmp_path, **settings)
    evaluated = read_rows(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert -6 <= evaluated["evaluation/reward"] <= 6


def test_a_language_model_may_write_the_critiques():
    """The tiny model has learnt nothing, so none of its critiques can be read."""
    method = made(None, annotator="tiny", instruction="{prompt} {response}", annotator_tokens=4)
    method.check()
    with pytest.raises(NothingToLearn, match="8 of 8 critiques failed"):
        method.collect(0)


WRONG = {
    "count": ([[]], "returned 1 values for 2 completions"),
    "kind": ([[], "good"], r"gave for completion 2 'good' \(str\): expected a list of spans"),
    "span": ([["warm"], []], r"completion 1 the span 'warm' \(str\): expected \(quote, score\)"),
    "score": ([[], [("b", 0.5)]], "completion 2 the score 0.5: expected -1, 0 or 1"),
    "end": ([[(0, 9, 1)], []], "completion 1 the characters 0 to 9 of a text that has 1"),
    "order": ([[{"start": 1, "end": 0, "score": 1}], []], "the characters 1 to 0"),
    "mapping": ([[{"text": "a"}], []], "expected .quote, score. or .start, end, score."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_critiques(case):
    returned, message = WRONG[case]
    with pytest.raises(PostgradError, match=message) as caught:
        load_critique(lambda completions: returned)(["p", "q"], ["a", "b"], {})
    assert str(caught.value).startswith("critique '<lambda>'")


def test_spans_in_all_forms():
    given = [[("a", 1), {"text": "b", "score": -1}, (0, 1, 0), {"start": 0, "end": 2, "score": 1}]]
    (said,) = load_critique(lambda completions: given)(["p"], ["ab"], {})
    assert [(span.quote, span.place, span.score) for span in said] == [
        ("a", None, 1), ("b", None, -1), ("", (0, 1), 0), ("", (0, 2), 1)
    ]  # fmt: skip
    real = load_critique(lambda completions: [[("a", 0.25)]], real_scores=True)
    assert real.balance(["p"], ["a"]) == [0.25]


def test_faults(tmp_path):
    with pytest.raises(PostgradError, match=r"critique: name a function, .* got neither"):
        made(None)
    both = {"model": "tiny", "critique": "a.py:b", "annotator": "tiny"}
    with pytest.raises(PostgradError, match=r"critique: name a function, .* got both"):
        Text2Grad(validated(Text2Grad.Config, both), Place(), data=ROWS)
    with pytest.raises(PostgradError, match=r"instruction: expected a text with {response}"):
        made(None, annotator="tiny", instruction="hello")
    with pytest.raises(PostgradError, match=r"critique 'no.py:b': no such file no.py"):
        made("no.py:b")
    with pytest.raises(PostgradError, match="unknown critique 'numeric'"):
        made("numeric")
    (tmp_path / "own.py").write_text(CRITIQUE)
    with pytest.raises(PostgradError, match=r"takes no weight, got 0.5"):
        made(f"{tmp_path / 'own.py'}:critique*0.5")

    def wants(completions, answer):
        return [[] for _ in completions]

    with pytest.raises(PostgradError, match="critique 'wants' needs the column 'answer'"):
        made(wants).check()


def test_the_claims_critique_marks_every_letter():
    (row,) = claim.rows(1, "a test")
    assert sorted(row["prompt"][:8]) == list(row["completion"])
    prompts, texts = ["dcbahgfe>"] * 3, ["abcdefgh", "abdcefghi", ""]
    marks = [[score for *_, score in said] for said in claim.critique(prompts, texts)]
    assert marks == [[1] * 8, [1, 1, -1, -1, 1, 1, 1, 1, -1], []]
    assert claim.total(prompts, texts) == [8, 3, 0]
    assert claim.success(prompts, texts) == [1, 0, 0]
