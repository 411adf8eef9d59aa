"""The embedded tasks: addition, docstrings, and those of reasoning-gym."""

import ast
import subprocess
import sys
from collections import Counter

import pytest

from postgrad.errors import PostgradError
from postgrad.rewards import load_rewards
from postgrad.tasks import Addition, Examples, load
from postgrad.tasks.reasoning import worked_sum


def check(row):
    a, b = int(row["prompt"][:3]), int(row["prompt"][4:7])
    assert row["prompt"] == f"{a:03d}+{b:03d}="
    assert int(row["answer"][::-1]) == a + b
    assert len(row["answer"]) == 4
    assert len(str(a)) == len(str(b)) == row["digits"]


def test_addition_rows():
    rows = Addition(0).draw(2000)
    for row in rows:
        check(row)
    shares = Counter(row["digits"] for row in rows)
    # three standard deviations of a share of 2000 draws are at most 0.034
    for digits, weight in ((1, 0.50), (2, 0.35), (3, 0.15)):
        assert abs(shares[digits] / 2000 - weight) < 0.034


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_addition_of_one_difficulty(digits):
    rows = Addition(0).draw(50, digits=digits)
    assert {row["digits"] for row in rows} == {digits}
    check(rows[0])


def test_addition_is_a_stream_by_seed_and_position():
    stream = Addition(4)
    assert stream.draw(10)[6:] == stream.draw(4, start=6)
    assert Addition(4).draw(10) == stream.draw(10) != Addition(5).draw(10)
    assert len({row["prompt"] for row in stream.draw(100, digits=3)}) > 90


def test_addition_corruption():
    rows = Addition(1).demonstrations(2000)
    wrong = [row for row in rows if row["completion"] != row["answer"]]
    assert abs(len(wrong) / 2000 - 0.15) < 0.025
    for row in wrong:
        differences = [a != b for a, b in zip(row["completion"], row["answer"], strict=True)]
        assert sum(differences) == 1
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in Addition(1).draw(2000)]
    clean = Addition(1).demonstrations(50, corruption=0.0)
    assert all(row["completion"] == row["answer"] for row in clean)


def test_addition_as_a_task():
    examples = load("addition", settings={"size": 40, "digits": 2, "corruption": 1.0})
    assert (examples.format, len(examples), examples.verifier) == ("prompts", 40, "addition")
    demonstrations = examples.require("demonstrations")
    assert all(row["completion"] != row["answer"] for row in demonstrations)
    assert (
        demonstrations.rows
        == load(
            "addition",
            format="demonstrations",
            settings={"size": 40, "digits": 2, "corruption": 1.0},
        ).rows
    )
    test = load("addition", split="test", seed=1)
    assert test.fingerprint == load("addition", split="test", seed=2).fingerprint
    assert load("addition", seed=1).fingerprint != load("addition", seed=2).fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digit": 3}, "unknown setting of addition 'digit': did you mean 'digits'"),
        ({"digits": 4}, "digits must be a whole number of at least 1 and at most 3, got 4"),
        ({"size": 0}, "size must be a whole number of at least 1, got 0"),
        ({"size": "many"}, "size must be a whole number"),
        ({"weights": [1, 2]}, "weights must be 3 numbers"),
        ({"weights": [0, 0, 0]}, "weights must be 3 numbers"),
    ],
)
def test_addition_refuses(settings, message):
    with pytest.raises(PostgradError, match=message):
        load("addition", settings=settings)


def test_addition_refuses_an_impossible_corruption():
    with pytest.raises(PostgradError, match="corruption must be between 0 and 1, got"):
        load("addition", format="demonstrations", settings={"corruption": 1.5})


@pytest.fixture(scope="module")
def docstrings():
    return load("docstrings"), load("docstrings", split="test")


def test_docstrings_are_enough_and_split_by_module(docstrings):
    train, test = docstrings
    assert len(train) >= 1500
    assert len(test) >= 300
    modules = [{row["module"] for row in split} for split in docstrings]
    assert modules[0].isdisjoint(modules[1])
    assert not any("test" in module.split(".") for module in modules[0] | modules[1])


def test_docstring_triples(docstrings):
    sentences = Counter()
    for split in docstrings:
        by_module = {}
        for row in split:
            by_module.setdefault(row["module"], set()).add(row["positive"])
            sentences[row["anchor"].lower()] += 1
        for row in split:
            assert row["negative"] in by_module[row["module"]]
            assert row["negative"] != row["positive"]
            assert row["negative_anchor"] != row["anchor"]
            assert 3 <= len(row["anchor"].split()) <= 40
            assert len(row["positive"]) <= 300
            assert "\n\n" not in row["positive"]
    assert sentences.most_common(1)[0][1] == 1


def test_sources_lack_their_docstring_and_are_whole_lines(docstrings):
    whole = 0
    for row in docstrings[1]:
        first = row["positive"].lstrip().splitlines()[0]
        assert first.startswith(("def ", "async def ", "@"))
        assert row["text"].lstrip().startswith(first)
        if len(row["positive"]) < 200:
            node = ast.parse(row["positive"]).body[0]
            assert ast.get_docstring(node) is None
            whole += 1
    assert whole > 100


def test_a_known_function(docstrings):
    rows = {(r["module"], r["function"]): r for split in docstrings for r in split}
    row = rows["bisect", "insort_right"]
    assert row["anchor"] == "Insert item x in list a, and keep it sorted assuming a is sorted."
    assert row["positive"].startswith("def insort_right(a, x, lo=0, hi=None, *, key=None):\n    if")
    assert '"""Insert item x in list a' in row["text"]


def test_docstrings_in_other_formats(docstrings):
    train = docstrings[0]
    pairs = train.require("preferences")
    assert len(pairs) == len(train)
    assert pairs.chat
    row, triple = pairs[5], train[5]
    assert row["prompt"].endswith(":\n\n" + triple["positive"])
    assert (row["chosen"], row["rejected"]) == (triple["anchor"], triple["negative_anchor"])
    assert train.require("text")[5]["text"] == triple["text"]
    assert train.require("pairs")[5]["positive"] == triple["positive"]
    demonstration = train.first(6).require("demonstrations")[5]
    assert demonstration["completion"] == triple["anchor"]
    assert (
        load("docstrings", format="text", split="train[:3]").rows == train.require("text").rows[:3]
    )


def test_docstrings_depend_on_seed_and_setting_only(docstrings):
    train, test = docstrings
    other = load("docstrings", seed=1)
    assert [row["anchor"] for row in other] == [row["anchor"] for row in train]
    assert [row["negative"] for row in other] != [row["negative"] for row in train]
    assert load("docstrings", split="test", seed=1).fingerprint == test.fingerprint
    short = load("docstrings", split="test", settings={"characters": 80})
    assert max(len(row["positive"]) for row in short) <= 80
    code = (
        "from postgrad.tasks import load; import sys; "
        "print(load('docstrings', split='test').fingerprint, {'this', 'torch'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # sources are read, never imported; and the tasks need no torch
    assert process.stdout.split() == [test.fingerprint, "set()"]
    with pytest.raises(PostgradError, match="'character': did you mean 'characters'"):
        load("docstrings", settings={"character": 3})


# tasks whose answer is one of several, known to their verifier only
def test_sums_come_with_their_workings():
    assert worked_sum("-5 + 55 - -22") == "-5 + 55 = 50\n50 - -22 = 72\n<answer>72</answer>"
    row = load("reasoning-gym/chain_sum", settings={"size": 1})[0]
    assert row["solution"].endswith(f"<answer>{row['answer']}</answer>")


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "leg_counting", "spell_backward"])
def test_reasoning_gym_scores_its_own_answers(task):
    examples = load(f"reasoning-gym/{task}", settings={"size": 5})
    assert (len(examples), examples.chat, examples.verifier) == (5, True, "reasoning-gym")
    rewards = load_rewards(examples.verifier)
    columns = {name: [row[name] for row in examples] for name in examples.columns[1:]}
    prompts = [row["prompt"] for row in examples]
    answers = [row["answer"] for row in examples]
    tagged = [f"<think>so</think><answer>{answer}</answer>" for answer in answers]
    assert rewards(prompts, answers, columns)[0] == [1.0] * 5
    assert rewards(prompts, tagged, columns)[0] == [1.0] * 5
    assert max(rewards(prompts, ["no idea"] * 5, columns)[0]) < 0.5
    assert rewards.probe(examples[0]) == {"reasoning-gym": 1.0}


def test_reasoning_gym_settings_reach_task_and_verifier():
    settings = {"size": 20, "min_terms": 2, "max_terms": 2, "max_digits": 1}
    examples = load("reasoning-gym/chain_sum", settings=settings)
    assert {row["entry"]["metadata"]["num_terms"] for row in examples} == {2}
    assert examples[0]["task_settings"] == {"min_terms": 2, "max_terms": 2, "max_digits": 1}


def test_reasoning_gym_splits_and_seeds_do_not_share_questions():
    task, size = "reasoning-gym/chain_sum", {"size": 200}
    splits = [
        {row["prompt"] for row in load(task, seed=seed, split=split, settings=size)}
        for seed, split in ((0, "train"), (1, "train"), (0, "test"))
    ]
    # two seeds share a question by chance only
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(splits[a] & splits[b]) < 10
    again = load(task, settings=size)
    assert again.fingerprint == load(task, settings=size).fingerprint
    assert load(task, split="test", seed=3).fingerprint == load(task, split="test").fingerprint


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chain_som", {}, "unknown task of reasoning-gym 'chain_som': did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 2}, "'max_term': did you mean 'max_terms'"),
        ("chain_sum", {"max_terms": 1}, "refused .max_terms must be >= min_terms"),
        ("chain_sum", {"max_terms": "many"}, "settings .* are refused"),
        ("chain_sum", {"size": 0}, "size must be a whole number of at least 1"),
        ("chain_sum", {"seed": 1}, "unknown setting of reasoning-gym/chain_sum 'seed'"),
        ("composite", {}, "Must specify at least one dataset"),
    ],
)
def test_reasoning_gym_refuses(name, settings, message):
    with pytest.raises(PostgradError, match=message):
        load(f"reasoning-gym/{name}", settings=settings)


def test_embedded_tasks_know_their_splits():
    assert Examples.has_test_split("docstrings")
    assert Examples.has_test_split("reasoning-gym/chain_sum")
    assert not Examples.has_test_split("data.jsonl")
    with pytest.raises(PostgradError, match="unknown split of addition 'tset': did you mean"):
        load("addition", split="tset")
    with pytest.raises(PostgradError, match="takes no column mapping"):
        load("addition", columns={"prompt": "question"})


def test_a_missing_package_names_its_extra(monkeypatch):
    for module in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PostgradError, match=r"'reasoning-gym'.*postgrad\[tasks\]"):
        load("reasoning-gym/chain_sum")
