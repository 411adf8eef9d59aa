"""The benchmarks' own machinery: turns, memory, failures, results and the table."""

import io
import os
from pathlib import Path

import pytest
from benchmarks import gpu
from benchmarks.harness import Contender, Outcome, race
from benchmarks.machine import folder_name
from benchmarks.rows import Results, Row, Setting, compared
from benchmarks.run import remarks, table
from rich.console import Console

from racers import holder, lazy, quitter, writer

MEGABYTE = 10**6


@pytest.fixture(autouse=True)
def _racers_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def linux_only() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory is read from Linux's /proc")


def test_contenders_take_turns_and_warm_ups_do_not_count(tmp_path: Path) -> None:
    file = str(tmp_path / "notes")
    outcomes = race(
        [Contender(name, writer, arguments={"name": name, "file": file}) for name in ("A", "BB")],
        repeats=3,
        warm_ups=1,
    )
    one_round = ["A begins", "A ends", "BB begins", "BB ends"]
    assert Path(file).read_text().splitlines() == one_round * 4
    for name, outcome in outcomes.items():
        assert outcome.failure is None
        assert len(outcome.seconds) == 3
        assert outcome.time > 0
        assert outcome.numbers == [{"length": len(name)}] * 3
        expected = sorted(len(name) / seconds for seconds in outcome.seconds)[1]
        assert outcome.rate("length") == pytest.approx(expected)


def test_the_peak_is_that_of_the_turn_above_imports_and_model() -> None:
    linux_only()
    sizes = [300 * MEGABYTE, 100 * MEGABYTE, 50 * MEGABYTE]
    task = {"sizes": sizes, "model_bytes": 0}
    above_model = {"sizes": sizes, "model_bytes": 30 * MEGABYTE}
    outcomes = race(
        [
            Contender("all", holder, arguments=task),
            Contender("above the model", holder, arguments=above_model),
        ],
        repeats=2,
        warm_ups=1,
    )
    assert outcomes["all"].memory == pytest.approx(sizes[1:], rel=0.2)
    assert outcomes["all"].peak == pytest.approx(100 * MEGABYTE, rel=0.2)
    assert outcomes["above the model"].peak == pytest.approx(70 * MEGABYTE, rel=0.2)


def test_a_failing_contender_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    task = {"name": "A", "file": str(tmp_path / "notes")}
    outcomes = race(
        [
            Contender("quitter", quitter),
            Contender("missing", writer, python=str(tmp_path / "python"), arguments=task),
            Contender("lazy", lazy),
            Contender("A", writer, arguments=task),
        ],
        repeats=2,
        warm_ups=0,
    )
    assert outcomes["quitter"].failure is not None
    assert outcomes["quitter"].failure.endswith("RuntimeError: out of luck")
    assert len(outcomes["quitter"].failure.splitlines()) <= 7
    assert "No such file" in str(outcomes["missing"].failure)
    assert outcomes["lazy"].failure == "it did not take all of its turns"
    assert len(outcomes["A"].seconds) == 2


def outcome(seconds: float, memory: int, tokens: int = 100) -> Outcome:
    return Outcome([seconds] * 3, [memory] * 3, [{"tokens": tokens}] * 3)


def test_a_ratio_says_how_many_times_better_we_are() -> None:
    outcomes = {"ours": outcome(0.5, 100 * MEGABYTE), "peer": outcome(2.0, 250 * MEGABYTE)}
    row = compared("by time", "peer", outcomes, reach=4, memory_reach=3)
    assert (row.ratio, row.reached) == (4, True)
    assert (row.memory_ratio, row.memory_reached) == (2.5, False)
    row = compared("by rate", "peer", outcomes, rate="tokens", reach=5)
    assert (row.ours, row.theirs, row.ratio, row.reached) == (200, 50, 4, False)
    assert Row("growth", ours=1.2, reach=1.25, at_most=True).reached is True
    assert Row("growth", ours=1.3, reach=1.25, at_most=True).reached is False
    assert Row("without a reach", ours=1.0).reached is None


def test_a_gpu_is_judged_by_its_own_limits_and_its_absence_is_said(monkeypatch) -> None:
    speed = {
        "device": "a GPU", "precision": "bf16", "shape": "1.5b", "matrix_rate": 7e14,
        "copy_rate": 4e12, "utilisation": 0.41, "update_tokens_per_second": 3e4,
        "decoded_tokens_per_second": 2e4, "bandwidth": 0.45, "peak_bytes": 40 * 2**30,
    }  # fmt: skip
    update, tokens, decoding, _ = gpu.rows_of(speed)
    assert (update.reached, decoding.reached, tokens.reached) == (True, False, None)
    assert update.note == "a GPU, bf16, the shape 1.5b; products 700 Tflop/s, copying 4,000 GB/s"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    missing = gpu.measure(Setting(1, "", quick=True))
    assert [row.ours for row in missing] == [None, None]
    for row in missing:
        assert row.failure == "device: 'cuda' asked for, but torch sees no NVIDIA GPU"


def test_results_of_different_processors_lie_apart() -> None:
    names = {
        "AMD EPYC": "amd-epyc",
        "Intel(R) Xeon(R) Processor": "intel-xeon",
        "Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz": "intel-core-i7-8700k",
        "": "unknown",
    }
    assert {name: folder_name(name) for name in names} == names


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [
        Row("time", ours=0.5, peer="peer", theirs=1.0, reach=3, turns={"ours": [0.4, 0.5, 0.6]}),
        Row("memory", memory=10, peer_memory=2**21, memory_reach=6, note="a note"),
        Row("broken", failure="exit code 1\nno luck"),
    ]
    results = Results("sample", "What it measures.", rows, {"processor": "a processor"})
    results.save(tmp_path)
    assert Results.load(tmp_path / "sample.json") == results
    assert '"reached": false' in (tmp_path / "sample.json").read_text()


def test_the_table_shows_lost_and_broken_rows() -> None:
    outcomes = {
        "ours": outcome(1.0, 300 * MEGABYTE),
        "peer": outcome(0.8, 150 * MEGABYTE),
        "broken": Outcome(failure="exit code 1\nno luck"),
    }
    rows = [
        compared("a lost row", "peer", outcomes, reach=2),
        compared("a broken row", "broken", outcomes, reach=2),
    ]
    results = [Results("sample", "What it measures.", rows)]
    page = io.StringIO()
    Console(file=page, width=200).print(table(results))
    lost = next(line for line in page.getvalue().splitlines() if "a lost row" in line)
    assert "0.8× peer wins" in lost
    assert "0.5× peer wins" in lost
    assert "2× ✗" in lost
    broken = next(line for line in page.getvalue().splitlines() if "a broken row" in line)
    assert "1 s" in broken
    assert "–" in broken
    assert remarks(results) == ["a broken row, could not run: broken: exit code 1\nno luck"]
