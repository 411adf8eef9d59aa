"""Meta policy optimisation: rubrics that change, on real runs of the tiny model."""

import json

import pytest
import torch

from language_runs import SMALL, assert_same_run, final_weights, write_rows
from postgrad.advantages.temporal import token_advantages
from postgrad.api import resume, train
from postgrad.claims import meta_po as claim
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.meta_po import MetaPO
from postgrad.rewards.evolving import (
    EvolvingReward,
    Item,
    items_of,
    screened,
    shares_of,
    stratified,
    uniform,
)
from postgrad.rewards.functions import load_function
from postgrad.rewards.rubrics import RubricJudge, RubricWriter, items_in, score_in
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 8,
    "epochs": 2,
    "minibatches": 2,
    "rollout": {"samples": 1, "max_new_tokens": 6},
    "frontier": {"max_new_tokens": 6},
    "meta_samples": 4,
    "missing_end_penalty": 0.0,
}
OWN = """
def judge(completions, rubric):
    '''A point for each of an item's letters in the response.'''
    return [
        {
            "scores": [sum(x in item.text for x in text) for item in rubric],
            "evaluation": f"it says {text}",
        }
        for text in completions
    ]


def refine(rubric, records):
    '''One vowel more each time, and at last the same rubric again.'''
    return [*rubric, *["iouaeiou"[len(rubric) - 1]]][:4]


def reward(completions):
    return [sum(x in "e" for x in text) for text in completions]
"""
OURS: dict = {}
exec(OWN, OURS)


def made(**given):
    objects = {"judge": OURS["judge"], "refine": OURS["refine"], "rubric": ["e"]}
    objects |= {k: given.pop(k) for k in ("judge", "refine", "screen", "rubric") if k in given}
    values = {"model": "tiny", **SHORT, **given}
    return MetaPO(validated(MetaPO.Config, values), Place(), data=ROWS, **objects)


def evolving(refine=lambda rubric, records: rubric, judge=OURS["judge"], **settings):
    return EvolvingReward(
        items_of(["e"], "rubric"),
        load_function(judge, "judge"),
        load_function(refine, "refine"),
        **settings,
    )


def generator():
    return torch.Generator().manual_seed(0)


def test_the_worked_example():
    """Items of 3, 2 and 2 points; KL 0.02 k1; gamma 1, lambda 0.95; with and without an end."""
    kl = torch.tensor([[0.2, -0.5, 0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    cases = {
        7.0: ([5.5655, 4.81, 4.0], [6.5655, 6.81, 7.0]),
        6.0: ([4.663, 3.86, 3.0], [5.663, 5.86, 6.0]),
    }
    for worth, (expected, returns_expected) in cases.items():
        rewards = -0.02 * kl
        rewards[0, -1] += worth
        advantages, returns = token_advantages(rewards, values, mask, discount=1.0, lambda_=0.95)
        torch.testing.assert_close(advantages[0], torch.tensor(expected), atol=1e-4, rtol=0)
        torch.testing.assert_close(returns[0], torch.tensor(returns_expected), atol=1e-4, rtol=0)


def test_an_item_that_all_pass_changes_no_advantage_once_the_critic_knows_it():
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 4, generator=random)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    last = torch.zeros(3, 4).index_put((torch.arange(3), mask.sum(1) - 1), torch.tensor(5.0))
    how = {"discount": 1.0, "lambda_": 0.95}
    before, _ = token_advantages(rewards, values, mask, **how)
    after, _ = token_advantages(rewards + last, values + 5, mask, **how)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    unknown, _ = token_advantages(rewards + last, values, mask, **how)
    assert float((unknown - before)[mask].abs().min()) > 4


def test_the_reward_is_the_sum_of_the_items_scores_or_the_mean_of_their_shares():
    def judge(completions, rubric):
        return [[3, 2, 2] for _ in completions]

    rubric = items_of(["a", {"text": "b", "points": 4}, {"text": "c", "points": 2}], "rubric")
    for normalise, worth in (("sum", 7.0), ("mean-of-fraction", (0.6 + 0.5 + 1.0) / 3)):
        found = EvolvingReward(
            rubric, load_function(judge, "judge"), load_function(judge, "refine"),
            normalise=normalise,
        )  # fmt: skip
        assert found.score(ROWS[:2], ["x", "y"]).rewards == pytest.approx([worth] * 2)


def test_an_update_changes_what_comes_after_it_and_nothing_before():
    found = evolving(OURS["refine"])
    first = found.score(ROWS[:2], ["eio", "eee"])
    assert first.rewards == [1, 3]
    found.remember(ROWS[:2], ["eio", "eee"], first)
    records = list(found.records)
    assert found.update(20, 2, "uniform", generator())
    assert [item.text for item in found.rubric] == ["e", "i"]
    assert first.rewards == [1, 3]
    assert records[0] == {
        "prompt": "a", "completion": "eio", "scores": [1], "reward": 1,
        "evaluation": "it says eio",
    }  # fmt: skip
    assert found.records == []
    assert found.score(ROWS[:2], ["eio", "eee"]).rewards == [2, 3]
    assert found.by_first_rubric(["a", "b"], ["eio", "eee"]) == [1, 3]
    assert [version.step for version in found.versions] == [0, 20]
    # at the same step nothing is done again
    assert not found.update(20, 2, "uniform", generator())


@pytest.mark.parametrize("returned", [lambda rubric: rubric, lambda rubric: []])
def test_an_unchanged_or_empty_rubric_leaves_the_reward_as_it_was(returned):
    found = evolving(lambda rubric, records: returned(rubric))
    found.remember(ROWS[:1], ["e"], found.score(ROWS[:1], ["e"]))
    assert not found.update(5, 1, "uniform", generator())
    assert found.version == 0
    assert found.rubric == (Item("e"),)


def test_rubrics_keep_their_order_without_doubles():
    written = ["b", {"text": " a ", "points": 2}, "b", Item("c")]
    assert items_of(written, "rubric") == (Item("b"), Item("a", 2.0), Item("c"))
    assert items_of("one", "rubric") == (Item("one"),)


def test_thirds_of_eight_are_three_three_and_two():
    rewards = [5.0, 1.0, 8.0, 3.0, 7.0, 2.0, 6.0, 4.0]
    thirds = [{1, 5, 3}, {7, 0, 6}, {4, 2}]
    for seed in range(5):
        chosen = stratified(rewards, 6, torch.Generator().manual_seed(seed))
        assert [len(third & set(chosen)) for third in thirds] == [2, 2, 2]
    assert sorted(stratified(rewards, 99, generator())) == list(range(8))
    assert stratified([2.0, 1.0], 6, generator()) == [0, 1]
    assert shares_of(7, 3) == [3, 2, 2]


def test_uniform_and_screened_choices():
    counts = torch.zeros(5)
    for seed in range(600):
        chosen = uniform(5, 2, torch.Generator().manual_seed(seed))
        assert chosen == sorted(set(chosen))
        counts[chosen] += 1
    # 240 each within four standard errors
    assert float((counts - 240).abs().max()) < 48
    assert uniform(2, 9, generator()) == [0, 1]
    labels = ["ok", "good", "bad", "ok", "bad"]
    assert screened(labels, 3) == [2, 4, 0]
    assert screened(labels, 9) == [2, 4, 0, 3]


def test_a_meta_judge_may_screen_the_records():
    seen = []

    def refine(rubric, records):
        seen.extend(record["completion"] for record in records)
        return rubric

    def screen(rubric, records):
        return ["bad" if record["completion"] == "x" else "good" for record in records]

    found = made(refine=refine, screen=screen, selector="screened").evolving
    scored = found.score(ROWS[:3], ["e", "x", "ee"])
    found.remember(ROWS[:3], ["e", "x", "ee"], scored)
    found.update(1, 2, "screened", generator())
    assert seen == ["x"]
    # nothing but good ones: nothing to mend
    found.remember(ROWS[:1], ["e"], found.score(ROWS[:1], ["e"]))
    assert not found.update(2, 2, "screened", generator())
    assert seen == ["x"]


def test_without_a_meta_step_it_is_ppo_to_the_bit(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    settings = {**SMALL, **SHORT, "data": write_rows(tmp_path / "rows.jsonl", ROWS), "steps": 2}
    meta = {"meta_samples": settings.pop("meta_samples"), "interval": 3, "rubric": "e"}
    own = f"{tmp_path / 'own.py'}"
    train(
        "meta-po",
        judge=f"{own}:judge",
        refine=f"{own}:refine",
        output=tmp_path / "meta",
        **settings,
        **meta,
    )
    train(
        "ppo-language", reward=f"{own}:reward", kl_coefficient=0.02, output=tmp_path / "ppo",
        **settings,
    )  # fmt: skip
    one, other = final_weights(tmp_path / "meta"), final_weights(tmp_path / "ppo")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = f"{tmp_path / 'own.py'}"
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_rows(tmp_path / "held.jsonl", ROWS),
        "judge": f"{own}:judge",
        "refine": f"{own}:refine",
        "rubric": ["e"],
        "interval": 2,
        "selector": "stratified",
        "sample_every": 1,
        "evaluate_every": 3,
    }
    train("meta-po", steps=6, output=tmp_path / "whole", **settings)
    train("meta-po", steps=3, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=6, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if "reward" in row]
    assert [row["rubric/version"] for row in rows] == [0, 0, 1, 1, 2, 2]
    histories = [(tmp_path / run / "model" / "rubrics.json") for run in ("whole", "parts")]
    one, other = (json.loads(file.read_text()) for file in histories)
    assert one == other
    assert [version["step"] for version in one] == [0, 2, 4]
    shown = read_rows(tmp_path / "whole" / "samples.jsonl")
    assert any(row.get("rubric") == "e (5)\ni (5)" for row in shown)
    first = next(row for row in shown if "rubric_version" in row)
    assert first["evaluation"] == f"it says {first['response']}"


def test_an_error_of_the_meta_judge_loses_nothing(tmp_path):
    """The step is refused before anything is changed, so it can be done again."""

    def fails(rubric, records):
        raise ConnectionError("gone")

    method = made(refine=fails, interval=1)
    method.collect(0)
    before = method.evolving.state_dict()
    with pytest.raises(PostgradError, match="refine 'fails' raised ConnectionError: gone"):
        method.collect(1)
    assert method.evolving.state_dict() == before
    assert len(before["records"]) == 8


def test_unreadable_scores_count_as_zero_up_to_a_share():
    def judge(completions, rubric):
        return [[None, 2] if text == "x" else [1, 2] for text in completions]

    rubric = items_of(["a", "b"], "rubric")
    parts = [load_function(judge, "judge"), load_function(judge, "refine")]
    scored = EvolvingReward(rubric, *parts).score(ROWS[:2], ["x", "y"])
    assert scored.rewards == [2, 3]
    assert scored.unread == [1, 0]
    with pytest.raises(PostgradError, match="judge 'judge': 50% of its scores could not be read"):
        EvolvingReward(rubric, *parts, most_unread=0.4).score(ROWS[:1], ["x"])


WRONG = {
    "count": ([[1]], "judge '<lambda>' returned 1 values for 2 completions"),
    "items": (
        [[1], [1, 2]],
        r"completion 2: got \[1, 2\] \(list\), expected 1 scores, one an item",
    ),
    "word": ([["good"], [1]], r"completion 1: got the score 'good' \(str\), expected a number"),
    "NaN": ([[1], [float("nan")]], "completion 2: got the score nan"),
    "mapping": ([{"score": 1}, [1]], "completion 1: got None, expected 1 scores"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_scores(case):
    returned, message = WRONG[case]
    found = evolving(judge=lambda completions, rubric: returned)
    with pytest.raises(PostgradError, match=message):
        found.score(ROWS[:2], ["a", "b"])


def test_faults():
    with pytest.raises(PostgradError, match="rubric: expected at least one item, got none"):
        made(rubric=[])
    with pytest.raises(PostgradError, match=r"judge: name a function, .* judge_model=…, got neith"):
        made(judge=None)
    with pytest.raises(PostgradError, match=r"refine: name a function, .* meta_model=…, got neith"):
        made(refine=None)
    with pytest.raises(PostgradError, match="meta_samples: expected at most the 16 responses of 2"):
        made(interval=2, meta_samples=17)
    with pytest.raises(PostgradError, match="screen: selector=screened needs a function"):
        made(selector="screened")
    with pytest.raises(PostgradError, match=r"judge_instruction: expected a text with .response"):
        made(judge=None, judge_model="tiny", judge_instruction="hello")
    with pytest.raises(PostgradError, match="interval"):
        made(interval=0)
    with pytest.raises(PostgradError, match="rubric has the item 3"):
        made(rubric=["a", 3])
    found = evolving(lambda rubric, records: 3)
    found.remember(ROWS[:1], ["e"], found.score(ROWS[:1], ["e"]))
    with pytest.raises(PostgradError, match="what refine '<lambda>' returned is 3 "):
        found.update(1, 1, "uniform", generator())


# A language model as judge and meta judge ----------------------------------------------------

RECORD = {"prompt": "p", "completion": "c", "scores": [1.0], "reward": 1.0, "evaluation": ""}


def test_a_language_model_judges_item_by_item():
    asked = []

    def chat(prompts, max_tokens):
        asked.extend(prompts)
        answers = ["It is warm.\nScore: 4", "score is 9", "Score 0 of 2, no: Score: 2", "?"]
        return [[answer] for answer in answers]

    rubric = [Item("Is it warm?"), Item("Is it short?", 2.0)]
    said = RubricJudge(chat)(["Eat?", "Drink?"], ["soup", "tea"], rubric)
    assert [one["scores"] for one in said] == [[4.0, None], [2.0, None]]
    assert said[0]["evaluation"] == "It is warm.\nScore: 4\nscore is 9"
    assert "Is it short?" in asked[3]
    assert "from 0 to 2" in asked[3]
    assert "Response:\ntea" in asked[3]
    assert score_in("Score: 3/5", 5) == 3
    assert score_in("Score: -1", 5) is None


def test_a_language_model_rewrites_the_rubric():
    rounds = []

    def chat(prompts, max_tokens):
        rounds.append(prompts)
        if "An analysis" in prompts[0]:
            return [['[{"text": "a", "points": 3}]'], ["no rubric"], ['[{"text": "b"}]']]
        if "Combine" in prompts[0]:
            return [['Both: [{"text": "a", "points": 3}, {"text": "b", "points": 1, "x": 0}]']]
        return [["too kind"]] * len(prompts)

    records = [RECORD, RECORD, {**RECORD, "answer": "42"}]
    refined = RubricWriter(chat).refine([Item("old")], records)
    assert refined == [{"text": "a", "points": 3}, {"text": "b", "points": 1}]
    analyse, refine, merge = rounds
    assert "Reference:\n42" in analyse[2]
    assert "Reference" not in analyse[0]
    assert "too kind" in refine[0]
    assert "Rubric 1:\n1. (0 to 3 points) a" in merge[0]
    assert "Rubric 2:\n1. (0 to 5 points) b" in merge[0]


def test_without_a_readable_rubric_there_is_none():
    assert (
        RubricWriter(lambda prompts, max_tokens: [["?"]] * len(prompts)).refine([], [RECORD]) == []
    )
    assert items_in('[{"text": ""}] [{"text": "x", "points": 0}] [1] []') == []


def test_a_language_model_screens_records():
    answers = ["Bad.", "I think good", "42"]
    writer = RubricWriter(lambda prompts, max_tokens: [[answer] for answer in answers])
    assert writer.screen([Item("x")], [RECORD] * 3) == ["bad", "good", "ok"]


def test_the_tiny_model_as_judge_gives_scores_that_cannot_be_read():
    """Parsing, counting and stopping work; it has learnt nothing, so it cannot judge."""
    given = {"judge": None, "refine": None, "rubric": ["e"], "judge_model": "tiny"}
    given |= {"meta_model": "tiny", "judge_instruction": "{response}"}
    method = made(**given, most_unread=1.0)
    batch = method.collect(0)
    assert (batch.reward == 0).all()
    assert method.describe_batch(batch)["reward/unread_items"] == 1.0
    with pytest.raises(PostgradError, match="100% of its scores could not be read"):
        made(**given).collect(0)


def test_it_learns_and_the_rubric_grows(tmp_path):
    run = train(
        "meta-po",
        data=ROWS * 8,
        judge=OURS["judge"],
        refine=OURS["refine"],
        output=tmp_path,
        config={"rubric": [{"text": "e", "points": 6}]},
        **{
            **SMALL,
            **SHORT,
            "steps": 12,
            "interval": 3,
            "batch_size": 32,
            "minibatches": 1,
            "epochs": 4,
            "learning_rate": 3e-3,
            "critic_rate": 1.0,
            "kl_coefficient": 0.0,
        },
    )
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "reward" in row]
    assert [item.points for item in run.method.evolving.rubric] == [6, 5, 5, 5]
    assert rows[-1]["rubric/items"] == 4
    # by letters of the last rubric, so that the versions compare
    assert rows[-1]["reward"] > 4 * rows[0]["reward"] + 1


# The claim's world ---------------------------------------------------------------------------


def test_the_library_counts_what_it_says():
    text = "abcdefghabce"
    found = {name: claim.points(name, "a", text) for name in claim.LIBRARY}
    assert found == {
        claim.FIRST: 1, "has twelve letters": 5, "says no letter twice in a row": 5,
        "uses many letters": 5, "repeats no pair": 4, "ends with another letter": 5,
        "rises as often as it falls": 1, "is half of early letters": 4,
    }  # fmt: skip
    assert claim.gold("a", text) == pytest.approx(30 / 40)
    assert claim.gold("a", "a" * 12) < 0.5
    assert claim.judge(["a"], [text], [Item(claim.FIRST), Item(claim.NOTHING)]) == [[1, 5]]
    assert 0 <= claim.gold("a", "") < 0.2


def test_the_claims_meta_judge_adds_what_praised_strings_break():
    praised = {"prompt": "a", "completion": "a" * 12, "reward": 1.0}
    blamed = {"prompt": "a", "completion": "bcdefghbdfhc", "reward": 0.0}
    names = claim.refined([Item(claim.FIRST)], [blamed, praised, blamed])[1:]
    assert 1 <= len([name for name in names if name != claim.NOTHING]) <= 2
    broken = {name for name in claim.LIBRARY if claim.points(name, "a", "a" * 12) == 0}
    assert {name for name in names if name != claim.NOTHING} <= broken
    once = claim.Once()
    records = [praised, blamed]
    grown = [Item(x) for x in once([Item(claim.FIRST)], records)]
    assert len(grown) > 1
    assert once(grown, records) == grown
