"""What `postgrad show` and the documentation say of a method."""

from typing import Literal

import pytest

from postgrad.catalogue import Entry, entries, method_class
from postgrad.claims.base import load_claim
from postgrad.config import LoopSettings, Settings, dotted_keys, setting
from postgrad.errors import PostgradError
from postgrad.reports.method import equation, method_facts, method_text, setting_facts, value_text

IMPLEMENTED = [slug for slug, entry in entries().items() if entry.python is not None]
STUDIES = [slug for slug, entry in entries().items() if entry.study]


class Inner(Settings):
    rank: int = setting(16, "rank of the update", gt=0)


class Parent(Settings):
    model: str = setting("tiny", "which model")
    inner: Inner = setting(Inner(), "adapters")
    rate: float = setting(1e-5, "step size", gt=0, le=1, source="paper")


class Child(Parent):
    form: Literal["on", "off"] | None = setting(None, "which form")
    inner: Inner = setting(Inner(rank=4), "adapters")


def test_settings_are_own_before_inherited_with_bounds_and_sources() -> None:
    facts = {fact.key: fact for fact in setting_facts(Child, {"rate": 0.5})}
    assert list(facts) == ["inner.rank", "form", "model", "rate"]
    assert facts["inner.rank"].default == "4"
    assert facts["inner.rank"].values == "whole number > 0"
    assert facts["form"].values == "on | off"
    assert facts["form"].default == "empty"
    assert facts["rate"].default == "0.5"
    assert facts["rate"].values == "number > 0, ≤ 1"
    assert facts["rate"].source == "this method's recipe"
    assert setting_facts(Child)[-1].source == "paper"


def test_recipes_reach_nested_settings() -> None:
    facts = {fact.key: fact for fact in setting_facts(Child, {"inner": {"rank": 8}})}
    assert facts["inner.rank"].default == "8"
    assert facts["inner.rank"].source == "this method's recipe"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "empty"),
        ("", "''"),
        ("tiny", "tiny"),
        (True, "true"),
        (1e-6, "1e-06"),
        (0.1, "0.1"),
        (16384, "16384"),
        (3.14159265, "3.14159265"),
        ((0.9, 0.999), "[0.9, 0.999]"),
        (["tensorboard"], "[tensorboard]"),
        ({}, "{}"),
    ],
)
def test_defaults_are_written_as_in_a_configuration(value: object, text: str) -> None:
    assert value_text(value) == text


def test_the_equation_is_what_a_docstring_indents() -> None:
    doc = "Title.\n\nIdea:\n\n    L = a\n      + b\n\n    R = c\n\nThen\n\n    D = d\n\nEnd."
    assert equation(doc) == "L = a\n  + b\nR = c\n\nD = d"
    assert equation("No equation.") == ""


@pytest.mark.parametrize("slug", IMPLEMENTED)
def test_a_method_is_shown_with_all_its_keys(slug: str) -> None:
    facts = method_facts(slug)
    text = method_text(slug)
    kind = method_class(slug)
    assert entries()[slug].title in text
    assert entries()[slug].needs.split()[0] in text
    assert facts.description
    shown = {fact.key for fact in facts.settings}
    # a nested mapping is shown by its keys, one that is empty by default as a whole
    nested = {key.rpartition(".")[0] for key in shown}
    tops = {key for key in dotted_keys(kind.Config) if "." not in key}
    assert tops <= shown | {key.split(".")[0] for key in nested}
    assert {fact.key for fact in facts.loop} == set(LoopSettings.model_fields)
    assert all(fact.meaning for fact in facts.settings)
    assert all(len(line) <= 100 or "  " not in line.strip() for line in text.splitlines()[2:])
    for key, value in kind.recipe.items():
        if key in LoopSettings.model_fields:
            row = next(fact for fact in facts.loop if fact.key == key)
            assert row.default == value_text(value)
            assert row.source == "this method's recipe"


def test_parts_of_policy_gradients_are_shown() -> None:
    text = method_text("grpo")
    for part in ("mask", "denominator", "advantage", "gradient"):
        assert f"\n  {part}" in text


def test_a_planned_method_says_so() -> None:
    planned = next(e for e in entries().values() if e.python is None and not e.study)
    text = method_text(planned.slug)
    assert planned.title in text
    assert text.endswith("Planned: not yet implemented.")


@pytest.mark.parametrize("slug", STUDIES)
def test_a_study_is_shown_by_its_own_text_and_how_it_is_run(slug: str) -> None:
    facts, text = method_facts(slug), method_text(slug)
    assert facts.description.startswith("A study: ")
    assert facts.equation
    assert facts.settings == ()
    assert entries()[slug].title in text
    assert "· study ·" in text
    assert f"postgrad reproduce {slug}" in text
    assert "Settings" not in text
    for finding in load_claim(slug).findings if facts.result else ():
        assert finding.statement.split()[0] in text
    with pytest.raises(PostgradError, match=f"{slug} is a study.*`postgrad reproduce {slug}`"):
        method_class(slug)


def test_a_study_without_a_result_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "result", lambda self: None)
    ending = "Claim: no recorded result.\nRun it: postgrad reproduce online-offline-gap"
    assert method_text("online-offline-gap").endswith(ending)


def test_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(PostgradError, match="did you mean 'grace'"):
        method_text("grase")
