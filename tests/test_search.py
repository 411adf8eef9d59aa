"""The standard library's documentation: its passages, questions about it, and searching it."""

import sys

import pytest

from language_runs import SMALL
from postgrad.api import train
from postgrad.errors import MissingExtra, PostgradError
from postgrad.methods.agents.search import Index, Search, SearchSettings
from postgrad.methods.agents.tools import ToolChoice, made_tool
from postgrad.rewards import load_rewards
from postgrad.tasks import load
from postgrad.tasks.documentation import Passage, passages

pytest.importorskip("bm25s")


@pytest.fixture(scope="module")
def questions():
    return load("stdlib-questions", settings={"size": 9999})


def test_passages_are_of_documented_public_objects():
    found = {passage.title: passage.text for passage in passages()}
    text = found["difflib.get_close_matches"]
    assert text.startswith("function difflib.get_close_matches(word, possibilities, n=3, cutoff")
    assert "class collections.OrderedDict(dict)" in found["collections.OrderedDict"]
    assert found["json"].startswith("module json\n")
    assert not any(part.startswith("_") for title in found for part in title.split("."))
    assert len(found) > 3000


def test_questions_have_short_answers(questions):
    test = load("stdlib-questions", split="test", settings={"size": 9999})
    rows = [*questions.rows, *test.rows]
    assert len(questions) > 2000
    assert len(test) > 300
    assert all(0 < len(form) < 100 for row in rows for form in row["answer"])
    modules = {row["module"] for row in test.rows}
    assert not modules & {row["module"] for row in questions.rows}
    everything = load("stdlib-questions", settings={"size": 9999}, seed=3)
    assert {row["prompt"] for row in everything.rows} == {row["prompt"] for row in questions.rows}


def test_what_is_asked(questions):
    test = load("stdlib-questions", split="test", settings={"size": 9999})
    answers = {
        row["prompt"].rpartition("\n\n")[2]: row["answer"] for row in [*questions.rows, *test.rows]
    }
    what = "method of the module datetime"
    for question, expected in (
        ("What is the default of the parameter width of textwrap.fill?", ["70"]),
        ("What is the default of the parameter n of difflib.get_close_matches?", ["3"]),
        ("Which class does collections.OrderedDict inherit from?", ["dict"]),
    ):
        assert answers[question] == expected
    # the sentence of textwrap.fill holds its name
    assert not any(question.startswith("Which") and "'Fill a" in question for question in answers)
    found = [question for question in answers if question.startswith(f"Which {what} is documented")]
    assert found
    two_steps = [
        question for question in answers if f"of the {what} that is documented" in question
    ]
    assert two_steps


def test_the_documentation_that_answers_is_found(questions):
    from postgrad.methods.agents.search import index

    hits = 0
    for row in questions.rows[:100]:
        query = row["prompt"].rpartition("\n\n")[2]
        hits += any(passage.title == row["about"] for passage in index().best(query, 3))
    assert hits > 90


def test_the_best_passages_come_first():
    texts = ["a red fox", "the red fox and the red hen", "grey geese", "red"]
    index = Index([Passage(text, text) for text in texts])
    assert index.best("geese", 3)[0].text == "grey geese"
    assert len(index.best("geese", 3)) == 1
    assert {p.text for p in index.best("a hen, a fox", 2)} == set(texts[:2])
    assert index.best("wolf", 3) == []
    assert index.best("", 3) == []
    assert len(index.best("red", 99)) == 3


def test_a_search_is_answered_by_a_few_short_passages():
    session = made_tool(ToolChoice(name="search", passages=2, characters=60)).session({})
    said = session.reply("hm <search>close matches difflib</search>")
    assert said.startswith("<result>function difflib.get_close_matches(")
    assert said.endswith("</result>")
    assert len(said) <= len("<result></result>") + 2 * 60 + 2
    assert session.reply("<search>zzqqzz</search>") == "<result>nothing</result>"
    assert session.reply("</search>") is None


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtra, match=r"postgrad\[tools\]"):
        Search(SearchSettings())


def test_wrong_settings_are_named():
    with pytest.raises(PostgradError, match=r"stdlib-questions.*siz"):
        load("stdlib-questions", settings={"siz": 3})


def test_igpo_searches_by_default(tmp_path):
    run = train(
        "igpo-information-gain", data={"name": "stdlib-questions", "settings": {"size": 40}},
        steps=1, batch_size=2, rollout={"samples": 2, "max_new_tokens": 20}, eval_size=4,
        output=tmp_path / "run", **SMALL,
    )  # fmt: skip
    assert (run.folder / "model").exists()
    rewards, _ = load_rewards("f1").of_rows(
        [{"prompt": "q", "answer": ["dict"]}], ["<answer>dict</answer>"], [[1]]
    )
    assert rewards == [1.0]
