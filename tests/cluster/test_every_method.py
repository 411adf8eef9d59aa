"""Every method on language takes the same steps in two processes with sharded weights."""

import json

import pytest

from language_runs import untimed
from postgrad.api import train
from postgrad.catalogue import entries, method_class
from several import together
from test_bad_input import FUNCTIONS, METHODS, ROW, valid

pytestmark = pytest.mark.cluster

REWARD = """
def vowels(completions):
    return [float(sum(c in "aeiou" for c in text) % 2) for text in completions]
"""
MORE = {
    "t-ppo": {"window": 4},
    "hpt": {"rollout": {"max_new_tokens": 40}},
}
WHOLE = ["differential-information"]  # weights in every process, not shares
SLUGS = [
    slug
    for slug in METHODS
    if entries()[slug].family.split("/")[0] in ("language", "agents", "representation")
    and "model" in method_class(slug).Config.model_fields
]


def trained(slug, output, settings):
    train(slug, output=output, **settings)


def steps(run):
    names = ("loss", "gradient_norm", "reward")
    return [
        {name: row[name] for name in names if name in row} for row in untimed(run) if "loss" in row
    ]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    rows = [{**ROW, "prompt": f"What is 2 + 3 + {i}?"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(FUNCTIONS + REWARD)
    return folder


@pytest.mark.parametrize("slug", SLUGS)
def test_two_processes_take_the_steps_of_one(slug, here, tmp_path):
    settings = {
        **valid(slug, here),
        "steps": 3,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    if "rollout" in method_class(slug).Config.model_fields:
        settings["rollout"] = {**settings.get("rollout", {}), "max_new_tokens": 8}
    if "reward" in settings and slug != "mixed-po":  # which wants pairs to differ
        settings["reward"] = f"{here}/own.py:vowels"
    settings |= MORE.get(slug, {})
    trained(slug, tmp_path / "one", settings)
    settings["shard"] = slug not in WHOLE
    assert not together(2, tmp_path / "share", trained, slug, tmp_path / "two", settings)
    found, expected = steps(tmp_path / "two"), steps(tmp_path / "one")
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
