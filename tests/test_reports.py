"""Reports: what a page shows of a run, a claim or a comparison, and that texts stay texts."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from postgrad.errors import PostgradError
from postgrad.evaluation.statistics import mean_interval
from postgrad.reports.claim import claim_parts, verdict_text, write_claim_report
from postgrad.reports.compare import write_compare_report
from postgrad.reports.run import write_run_report
from postgrad.reports.samples import browser, sample
from postgrad.visible import visible
from run_folders import HOSTILE_TEXTS, RUN, Page, run_folder

HOSTILE = (
    '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & "quoted" \u2028 \ud83d'
)
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def strict(text: str) -> Any:
    """JSON as browsers read it: without NaN and infinities."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_self_contained(text: str, page: Page) -> None:
    """No request leaves the page, and no script runs in it but its own."""
    for tag, attributes in page.elements:
        assert "src" not in attributes
        if tag == "link":
            assert attributes["href"] == "data:,"
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])
    program = page.scripts[-1]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy["content"])
    kinds = [attributes.get("type") for attributes in page.all("script")]
    assert kinds[-1] is None
    assert all(kind == "application/json" for kind in kinds[:-1])


def test_a_run_report_shows_evaluations_settings_and_provenance(tmp_path: Path) -> None:
    path = write_run_report(run_folder(tmp_path / "run"))
    text, page = read(path)
    assert path == tmp_path / "run" / "report.html"
    assert_self_contained(text, page)
    words = " ".join(page.text.split())
    assert "GRACE: Generative Representation Learning via Contrastive Policy Optimization" in words
    assert "mrr 0.3020 0.4270 +0.125" in words
    assert "loss 2 1.500 −0.500" in words
    assert "Before training" in words
    assert "After step 4" in words
    assert "data.columns.anchor q" in words
    assert "postgrad train grace 'data.columns.anchor=my question'" in words
    assert "/home/ada" not in words
    assert "sha256:9f2b0c7a" in words
    assert "04 May 2026, 09:12" in words
    # 4 steps of 10 s, of which 12 s rollout, 20 s update and 8 s unnamed
    assert "rollout 12.0 s 30 %" in words
    assert "update 20.0 s 50 %" in words
    assert "other 8.0 s 20 %" in words
    assert {"https://arxiv.org/abs/2510.04506"} == {
        str(a["href"]) for a in page.all("a") if not str(a["href"]).startswith("#")
    }


def evaluation_rows(folder: Path) -> list[list[str]]:
    text = write_run_report(folder).read_text(encoding="utf-8")
    table = text.partition('id="evaluation"')[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(?:<strong>)?([^<]*)", row)[:4] for row in rows]


def test_an_evaluation_stands_under_the_step_at_which_it_was_made(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "evaluation/mrr": 0.25, "evaluation/base_only/mrr": 0.5},
        {"step": 2, "evaluation/mrr": 0.5},
        {"step": 4, "evaluation/mrr": 0.75, "evaluation/late": 0.125},
    ]
    assert evaluation_rows(run_folder(tmp_path / "several", rows)) == [
        ["Metric", "Before training", "After step 4", "Change"],
        ["mrr", "0.2500", "0.7500", "+0.500"],
        ["base only / mrr", "0.5000", "–", "–"],
        ["late", "–", "0.1250", "–"],
    ]
    first = evaluation_rows(run_folder(tmp_path / "first", rows[:1]))
    assert first[1] == ["mrr", "0.2500", "–", "–"]
    last = evaluation_rows(run_folder(tmp_path / "last", rows[2:]))
    assert last[1] == ["mrr", "–", "0.7500", "–"]


def test_a_run_report_marks_loop_settings_that_were_changed(tmp_path: Path) -> None:
    text, _ = read(write_run_report(run_folder(tmp_path / "run", clip_norm=0.25)))
    changed = re.findall(r'<tr class="changed"><th[^>]*>([^<]+)', text)
    assert sorted(changed) == ["clip_norm", "learning_rate", "steps"]


def test_every_metric_has_its_figure(tmp_path: Path) -> None:
    rows = [{"step": s, "reward/a": 1.0, "reward/b": 2.0, "kl": 0.1, "x/y": s} for s in (1, 2)]
    _, page = read(write_run_report(run_folder(tmp_path / "run", rows)))
    drawn = [a["aria-label"] for a in page.all("svg") if "aria-label" in a]
    assert drawn == ["a", "b", "kl", "x / y"]
    assert {"metrics-reward", "metrics-training"} <= {a.get("id") for a in page.all("section")}


def test_metrics_that_differ_in_a_number_share_a_figure(tmp_path: Path) -> None:
    names = [f"ratio/mean_step_{i}" for i in range(3)] + ["ratio/std_0", "ratio/std_1"]
    rows = [{"step": step, **dict.fromkeys(names, 1.0)} for step in (1, 2)]
    rows[1]["ratio/mean_step_2"] = math.nan
    _, page = read(write_run_report(run_folder(tmp_path / "run", rows)))
    drawn = [a["aria-label"] for a in page.all("svg") if "aria-label" in a]
    assert drawn == ["mean step", "std 0", "std 1"]
    assert "Values that are not finite are left out: 1." in page.text


def test_hover_texts_are_the_values(tmp_path: Path) -> None:
    rows = [{"step": s, "kl": 0.5 * s} for s in (1, 2, 3)]
    _, page = read(write_run_report(run_folder(tmp_path / "run", rows)))
    hover = strict(str(next(a for a in page.all("svg") if "data-hover" in a)["data-hover"]))
    assert [point[2:] for point in hover["series"][0]["at"]] == [
        ["1", "0.5000"], ["2", "1"], ["3", "1.500"],
    ]  # fmt: skip


def test_what_a_model_wrote_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    row = {
        "prompt": HOSTILE,
        "response": HOSTILE,
        "tokens": [HOSTILE, "b"],
        "advantages": [0.5, -0.5],
        "rationale_before": HOSTILE,
        "rationale_after": HOSTILE,
        HOSTILE: 1.0,
    }
    shown = HOSTILE.replace("\ud83d", "")  # half a character cannot stand in a YAML file
    folder = run_folder(
        tmp_path / "run",
        metrics=[{"step": 1, f"evaluation/{shown}": 0.5, f"time/{shown}": 1.0, "time/step": 2.0}],
        samples=[{"step": 1, **row}],
        run={**RUN, "command": ["postgrad", shown], "data": {shown: shown}, "machine": shown},
        instruction=shown,
    )
    text, page = read(write_run_report(folder))
    assert_self_contained(text, page)
    assert len(page.scripts) == 2
    assert page.all("img") == []
    assert page.text.count(visible(shown)) >= 4
    found = strict(page.scripts[0])[0]["rows"][0]
    seen = visible(HOSTILE)
    assert found["texts"] == [["prompt", seen], ["response", seen]]
    assert found["tokens"] == [seen, "b"]
    assert found["pairs"] == [["rationale", seen, seen]]
    assert found["numbers"] == [[seen, 1.0]]


def assert_seen(text: str, page: Page, known: str = "") -> None:
    """The page has no elements and no odd characters but ours, and some of what was written."""
    assert visible(text) == text
    assert not {name for name, _ in page.elements} & {"img", "b"}
    assert len(page.scripts) <= 2
    assert all("onload" not in attributes for _, attributes in page.elements)
    assert known in page.text


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_texts_are_seen_as_they_are_in_every_page(text: str, tmp_path: Path) -> None:
    row = {"step": 1, "prompt": text, "response": text, "tokens": [text], "advantages": [1.0]}
    folder = run_folder(
        tmp_path / "run", [{"step": 1, f"reward/{text[:99]}": 1.0}], [row, {"step": 1, text: text}]
    )
    html, page = read(write_run_report(folder))
    assert_self_contained(html, page)
    assert_seen(html, page)
    assert len(html) < 1_500_000
    first, second = strict(page.scripts[0])[0]["rows"]
    assert first["texts"][0][1].startswith(visible(text)[:40_000])
    assert visible(second["texts"][0][1]) == second["texts"][0][1]

    runs = [{"method": "dpo", "seed": 0, "metrics": [{"step": 1, text[:99]: 1.0}]}]
    made = write_compare_report(runs, tmp_path / "c.html", title=text, config={"data": text})
    html, page = read(made)
    assert_self_contained(html, page)
    assert_seen(html, page, visible(text))

    result = {**claim_result("yes"), "notes": text, "claim": text, "task": text}
    html, page = read(write_claim_report(result, tmp_path / "claim.html"))
    assert_self_contained(html, page)
    assert_seen(html, page, visible(text))


def test_the_script_of_samples_makes_no_markup_of_texts() -> None:
    folder = Path(sys.modules["postgrad.reports.run"].__file__ or "").parent / "assets"
    script = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.js"))
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in script
    assert "</script" not in script


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    metrics = [{"step": s, "kl": math.nan if s == 2 else float(s)} for s in range(1, 5)]
    metrics.append({"step": 4, "evaluation/loss": math.inf})
    rows = [
        {"step": 1, "prompt": "p", "reward": math.nan, "tokens": ["a"], "advantages": [math.inf]}
    ]
    _, page = read(write_run_report(run_folder(tmp_path / "run", metrics, rows)))
    assert "Values that are not finite are left out: 1." in page.text
    assert "∞" in page.text
    found = strict(page.scripts[0])[0]["rows"][0]
    assert found["numbers"] == [["reward", "not a number"]]
    assert found["advantages"] == ["∞"]


@pytest.mark.parametrize(
    "value",
    [
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:image/png;base64,iVBORw0KGgo= onload=alert(1)",
        "data:image/png,raw",
        "https://example.org/pixel.png",
        "javascript:alert(1)",
    ],
)
def test_only_png_within_the_row_is_an_image(value: str) -> None:
    assert sample({"step": 1, "image": PIXEL})["images"] == [["image", PIXEL]]
    found = sample({"step": 1, "image": value})
    assert found["images"] == []
    assert found["texts"] == [["image", value]]


def test_fields_of_a_sample_are_sorted_by_how_they_are_shown() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    found = sample(
        {
            "step": 3,
            "note": "seen twice",
            "response": "4",
            "prompt": turns,
            "reward": 1,
            "solved": True,
            "left_before": "alone",
            "odd": {"a": [1]},
            "nothing": None,
        }
    )
    assert found["texts"] == [
        ["prompt", "system: Be brief.\n\nuser: 2+2?"],
        ["response", "4"],
        ["note", "seen twice"],
        ["left_before", "alone"],
        ["odd", '{\n "a": [\n  1\n ]\n}'],
    ]
    assert found["numbers"] == [["reward", 1], ["solved", True]]
    assert found["pairs"] == []


def test_tokens_and_advantages_of_different_lengths_are_remarked() -> None:
    found = sample({"step": 1, "tokens": ["a", "b", "c"], "advantages": [0.1, 0.2]})
    assert found["remark"] == "3 tokens came with 2 advantages."


def test_many_samples_are_thinned_and_the_page_says_so() -> None:
    rows = [{"step": step, "prompt": "x" * 100} for step in range(1, 65)]
    assert browser(rows)["note"] == ""
    found = browser(rows, largest=4000)
    steps = [step["step"] for step in found["steps"]]
    assert 1 < len(steps) < 64
    assert steps[-1] == 64
    assert len(json.dumps(found["steps"])) <= 4000
    assert found["note"] == f"{len(steps)} of 64 sampled steps; samples.jsonl has all of them."


def test_a_run_without_metrics_and_samples_has_a_report(tmp_path: Path) -> None:
    text, page = read(write_run_report(run_folder(tmp_path / "run", [])))
    assert_self_contained(text, page)
    assert "0 of 4" in page.text
    assert "Samples" not in page.text


def test_a_last_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "los')
    assert "4" in read(write_run_report(folder))[1].text


def test_a_method_that_the_catalogue_lacks_is_reported_by_its_name(tmp_path: Path) -> None:
    _, page = read(write_run_report(run_folder(tmp_path / "run", run={**RUN, "method": "mine"})))
    assert "mine" in page.text


def test_a_folder_that_is_no_run_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PostgradError, match=r"is not a run folder: it has no config\.yaml"):
        write_run_report(tmp_path)
    folder = run_folder(tmp_path / "run")
    (folder / ".report.html.part").mkdir()
    with pytest.raises(PostgradError, match=r"cannot write the report .*report\.html"):
        write_run_report(folder)
    assert not (folder / "report.html").exists()


def test_reports_need_no_torch() -> None:
    code = (
        "import sys, postgrad.reports.run, postgrad.reports.claim, postgrad.reports.compare;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ARMS = {
    "GRACE": {"mrr": [0.46, 0.47, 0.48], "length": [22.0, 23.0, 24.0]},
    "InfoNCE": {"mrr": [0.40, 0.43, 0.41]},
    "base <model>": {"mrr": [0.30, 0.31, 0.29]},
}


def claim_result(holds: str, seeds: int = 3, higher: bool = True) -> dict[str, Any]:
    arms = {
        arm: {name: all_seeds[:seeds] for name, all_seeds in values.items()}
        for arm, values in ARMS.items()
    }

    def side(arm: str) -> dict[str, Any]:
        interval = mean_interval(arms[arm]["mrr"])
        return {"name": arm, "mean": interval.mean, "low": interval.low, "high": interval.high}

    return {
        "slug": "grace",
        "claim": "rationales lift retrieval",
        "task": "docstrings",
        "metric": "mrr",
        "higher_is_better": higher,
        "method": side("GRACE"),
        "baseline": side("InfoNCE"),
        "seeds": seeds,
        "holds": holds,
        "seconds": 75.0,
        "notes": "a note with <b>",
        "arms": arms,
        "curves": {
            "GRACE": [{"mrr": [[0, 0.3], [4, 0.3 + 0.1 * s]]} for s in range(seeds)],
            "InfoNCE": [{"gold over proxy": [[0.5, 1.0], [0.4, 0.9]]} for _ in range(seeds)],
            "base <model>": [{} for _ in range(seeds)],
        },
        "versions": {"python": "3.11.9", "postgrad": "0.1.0"},
    }


@pytest.mark.parametrize(
    ("holds", "headline"),
    [
        ("yes", "The claim holds here."),
        ("no", "The claim does not reproduce here."),
        ("not separable", "The claim is not separable at this size."),
        ("quick run, not decided", "Quick run, not decided."),
    ],
)
def test_the_verdict_in_plain_words(holds: str, headline: str) -> None:
    # differences 0.06, 0.04, 0.07: mean 0.0567, deviation 0.01528, times 4.3027 / sqrt 3
    assert verdict_text(claim_result(holds)) == (
        f"{headline} mrr: GRACE 0.4700 against InfoNCE 0.4133, a difference of 0.0567 "
        "(95 % interval 0.0187 to 0.0946, seed by seed)."
    )


def test_a_claim_report_shows_all_arms_with_their_intervals(tmp_path: Path) -> None:
    path = write_claim_report(claim_result("yes"), tmp_path / "made" / "report.html")
    text, page = read(path)
    assert_self_contained(text, page)
    words = " ".join(page.text.split())
    assert "The claim holds here. “rationales lift retrieval”" in words
    assert "GRACE 0.4700 ± 0.025 23 ± 2.5" in words
    assert "base <model> 0.3000 ± 0.025 –" in words
    assert "a note with <b>" in words
    assert page.all("b") == []
    assert text.count('class="whisker"') == 3
    assert text.count('class="ring"') == 9
    # a curve with a mean and a band, and one of a measured value over another as three paths
    assert text.count('class="band"') == 1
    assert text.count('class="line"') == 1 + 3
    assert ">proxy</text>" in text


def test_the_findings_of_a_study_are_a_table_of_both_sides_and_verdicts(tmp_path: Path) -> None:
    result = claim_result("yes")
    assert claim_parts(result).findings is None
    sides = {"method": {"name": "InfoNCE"}, "baseline": {"name": "GRACE"}}
    result["findings"] = [
        {"statement": "speed & <more>", "metric": "mrr", "holds": "not separable", **sides}
    ]
    text, page = read(write_claim_report(result, tmp_path / "report.html"))
    assert_self_contained(text, page)
    words = " ".join(page.text.split())
    assert "speed & <more> mrr InfoNCE: 0.4133" in words
    assert "GRACE: 0.4700 ± 0.025 not separable" in words
    assert 'href="#findings"' in text


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    result = json.loads(json.dumps(claim_result("not separable", seeds=1)))
    parts = claim_parts(result)
    assert "whisker" not in parts.whiskers
    assert "±" not in parts.table
    assert "interval" not in verdict_text(result)
    assert write_claim_report(result, tmp_path / "report.html").is_file()


def comparison() -> list[dict[str, Any]]:
    runs = []
    for method, gain in (("dpo", 0.1), ("sft", 0.2)):
        for seed in range(3):
            rows: list[dict[str, Any]] = [
                {"step": s, "loss": 1.0 / s, "time/step": 2.0, f"only/{method}": 1.0}
                for s in (1, 2, 3)
            ]
            rows.append({"step": 3, "evaluation/accuracy": 0.5 + gain + 0.01 * seed})
            runs.append({"method": method, "seed": seed, "metrics": rows, "samples": 96})
    return runs


def test_a_comparison_shows_what_methods_ended_with_and_shared_curves(tmp_path: Path) -> None:
    path = write_compare_report(
        comparison(), tmp_path / "report.html", title="dpo <and> sft", config={"data": "docstrings"}
    )
    text, page = read(path)
    assert_self_contained(text, page)
    words = " ".join(page.text.split())
    assert "dpo <and> sft" in words
    assert "dpo 0.6100 ± 0.025 sft 0.7100 ± 0.025" in words
    assert "arXiv:2305.18290 3 3 96 6.0 s" in words
    drawn = [a["aria-label"] for a in page.all("svg")]
    assert drawn == ["accuracy", "accuracy", "loss", "time / step"]


def test_reward_is_drawn_over_the_divergence_it_costs(tmp_path: Path) -> None:
    def rows(gain: float) -> list[dict[str, float]]:
        return [
            {"step": step, "evaluation/reward": gain * step, "evaluation/kl": 0.5 * step}
            for step in range(3)
        ] + [{"step": 3, "evaluation/reward": float("nan"), "evaluation/kl": 9.0}]

    runs = [
        {"method": method, "seed": seed, "metrics": rows(gain)}
        for method, gain in (("dpo", 1.0), ("ipo", 2.0))
        for seed in (0, 1)
    ]
    _, page = read(write_compare_report(runs, tmp_path / "r.html", title="t", config={}))
    drawn = {a["aria-label"]: a for a in page.all("svg")}
    assert "win rate over KL to the reference" not in drawn
    hover = json.loads(drawn["reward over KL to the reference"]["data-hover"])
    assert hover["label"] == "KL in nats"
    paths = [(line["name"], [point[2:] for point in line["at"]]) for line in hover["series"]]
    assert paths[::2] == [
        ("dpo", [["0", "0"], ["0.500000", "1"], ["1", "2"]]),
        ("ipo", [["0", "0"], ["0.500000", "2"], ["1", "4"]]),
    ]


def test_a_comparison_without_samples_evaluations_or_runs(tmp_path: Path) -> None:
    runs = [{"method": "dpo", "seed": 0, "metrics": [{"step": 1, "loss": 1.0}]}]
    _, page = read(write_compare_report(runs, tmp_path / "one.html", title="t", config={}))
    assert "Final evaluation" not in page.text
    with pytest.raises(ValueError, match="no runs"):
        write_compare_report([], tmp_path / "none.html", title="t", config={})
