"""Every claim runs: quickly here, and its committed result is one that `reproduce` wrote."""

import json
import pkgutil
from dataclasses import replace

import pytest

import postgrad.claims
from postgrad.catalogue import entries
from postgrad.claims.base import Claim, Finding, Outcome, load_claim
from postgrad.claims.run import reproduce, save_result, summarise
from postgrad.errors import PostgradError

MODULES = {found.name for found in pkgutil.iter_modules(postgrad.claims.__path__)}
CLAIMED = [slug for slug in entries() if slug.replace("-", "_") in MODULES]
RECORDED = [slug for slug in CLAIMED if entries()[slug].result()]


@pytest.mark.parametrize("slug", CLAIMED)
def test_every_claim_runs_quickly_and_decides_nothing(slug, tmp_path):
    result = reproduce(slug, quick=True, seeds=1, output=tmp_path, jobs=1)
    claim = load_claim(slug)
    assert result["holds"] == "quick run, not decided"
    assert set(result["arms"]) == set(claim.arms)
    assert all(claim.metric in values for values in result["arms"].values())
    again = reproduce(slug, quick=True, seeds=1, output=tmp_path, jobs=1)
    assert again["arms"] == result["arms"]


@pytest.mark.parametrize("slug", RECORDED)
def test_a_recorded_result_is_that_of_its_claim(slug):
    recorded, claim = entries()[slug].result(), load_claim(slug)
    assert recorded["claim"] == claim.statement
    assert list(recorded["arms"]) == list(claim.arms)
    assert recorded["metric"] == claim.metric
    findings = [(each["statement"], each["metric"]) for each in recorded.get("findings", [])]
    assert findings == [(each.statement, each.metric) for each in claim.findings]
    assert recorded["seeds"] >= 3
    means = {
        arm: sum(v[claim.metric]) / len(v[claim.metric]) for arm, v in recorded["arms"].items()
    }
    assert recorded["method"]["mean"] == pytest.approx(means[claim.method], rel=1e-3)
    assert recorded["baseline"]["mean"] == pytest.approx(means[claim.baseline], rel=1e-3)


def test_a_summary_compares_seed_by_seed_and_is_saved_compactly(tmp_path):
    claim = Claim(
        slug="x", statement="s", task="t", metric="m", higher_is_better=True, method="a",
        baseline="b", arms=("a", "b"), run=lambda arm, seed, quick: Outcome({"m": 0.0}),
    )  # fmt: skip
    found = {
        (arm, seed): {
            "values": {"m": seed + gain},
            "curves": {"c": [(float(i), 0.0) for i in range(200)]},
            "seconds": 1.0,
        }
        for arm, gain in (("a", 1.0), ("b", 0.5))
        for seed in range(3)
    }
    result = summarise(claim, found, 3, quick=False)
    # the arms overlap over seeds, but within each seed the method is better by the same amount
    assert result["holds"] == "yes"
    save_result(result, tmp_path / "x.json")
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["method"]["high"] == pytest.approx(result["method"]["high"], rel=1e-4)
    assert len(saved["curves"]["a"][0]["c"]) <= 60


def test_a_studys_findings_have_verdicts_of_their_own():
    higher = Finding("b is higher", "m", "b", "a")
    lower = Finding("b has less n", "n", "b", "a", higher_is_better=False)
    claim = Claim(
        slug="x", statement="s", task="t", metric="m", higher_is_better=True, method="a",
        baseline="b", arms=("a", "b"), run=lambda arm, seed, quick: Outcome({}),
        findings=(higher, lower),
    )  # fmt: skip
    found = {
        (arm, seed): {"values": {"m": seed + gain, "n": float(gain * seed)}, "seconds": 1.0}
        for arm, gain in (("a", 1.0), ("b", 0.5))
        for seed in range(3)
    }
    result = summarise(claim, found, 3, quick=False)
    assert result["holds"] == "yes"
    assert [each["holds"] for each in result["findings"]] == ["no", "not separable"]
    assert result["findings"][0]["statement"] == "b is higher"
    assert result["findings"][0]["method"]["name"] == "b"
    assert result["findings"][1]["baseline"]["mean"] == pytest.approx(1.0)
    quick = summarise(claim, found, 3, quick=True)
    assert {each["holds"] for each in quick["findings"]} == {"quick run, not decided"}
    with pytest.raises(ValueError, match="'c' is not among the arms"):
        replace(claim, findings=(replace(higher, method="c"),))


def test_what_has_no_claim_says_so():
    with pytest.raises(PostgradError, match="sft has no claim"):
        load_claim("sft")
    with pytest.raises(PostgradError, match="unknown method 'gracee'"):
        load_claim("gracee")
