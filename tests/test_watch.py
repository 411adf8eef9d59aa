"""`postgrad watch`: a run that grows, is cut back, ends, is not there yet; and what a sample is."""

import io
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from postgrad.cli import main
from postgrad.errors import PostgradError
from postgrad.reports import following
from postgrad.reports.following import Followed, Tail, newest, state_of
from postgrad.reports.terminal import watch
from postgrad.training.console import Terminal
from postgrad.training.record import RunFolder
from postgrad.visible import visible
from run_folders import HOSTILE_TEXTS, run_folder

REWARDS = [{"step": step, "reward": step / 10, "loss": -step} for step in range(1, 11)]


def append(path: Path, *rows: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def say(folder: Path, state: str, **more: Any) -> None:
    status = {"state": state, "why": "", "host": platform.node(), "process": os.getpid(), **more}
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")


def seen(*folders: Path, width: int = 80, terminal: bool = False, **settings: Any) -> str:
    """What `watch` prints."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        height=40,
        force_terminal=terminal,
        highlight=False,
        color_system=None,
    )
    watch(folders, console=console, **settings)
    return out.getvalue()


def test_rows_come_once_their_line_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)
    append(path, {"step": 1}, '{"step": 2, "rew')
    assert tail.read() == ([{"step": 1}], False)
    assert tail.behind == len('{"step": 2, "rew')
    append(path, 'ard": 0.5}\n')
    assert tail.read() == ([{"step": 2, "reward": 0.5}], False)
    assert tail.read() == ([], False)
    assert tail.damaged == 0


def test_a_file_that_was_cut_back_begins_anew(tmp_path: Path) -> None:
    """As on resumption: rows after the checkpoint are dropped, and the file is another one."""
    run = RunFolder(tmp_path)
    run.open({})
    for row in REWARDS:
        run.metrics(row["step"], {"reward": row["reward"]})
    tail = Tail(tmp_path / "metrics.jsonl")
    assert len(tail.read()[0]) == 10
    again = RunFolder(tmp_path)
    again.open({}, 4, {"metrics.jsonl": 4})
    again.metrics(5, {"reward": -1.0})
    rows, restarted = tail.read()
    assert restarted
    assert [row["reward"] for row in rows] == [0.1, 0.2, 0.3, 0.4, -1.0]


def test_a_followed_run_forgets_what_was_cut_off(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", REWARDS)
    run = Followed(folder, "run")
    run.catch_up()
    assert run.step == 10
    text = "".join(json.dumps(row) + "\n" for row in REWARDS[:3])
    (folder / "new").write_text(text, encoding="utf-8")
    (folder / "new").replace(folder / "metrics.jsonl")
    run.catch_up()
    assert run.step == 3
    assert run.curves["reward"] == [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)]


@pytest.mark.parametrize("most", [7, 64, 1000, 10_000])
def test_pieces_of_any_size_give_all_rows_forwards_and_backwards(tmp_path: Path, most: int) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"step": step, "text": "ä" * (step % 5)} for step in range(100)]
    append(path, *rows, '{"step": 100, "te')
    fitting = rows if most > 60 else []  # the longest line has 50 bytes
    tail, forwards = Tail(path), []
    while True:
        before = tail.behind
        found, _ = tail.read(most)
        forwards += found
        if not found and tail.behind == before and before <= most:
            break
    assert forwards == fitting
    at, backwards = None, []
    while True:
        part = newest(path, 3, before=at, most=most)
        assert len(part.rows) <= 3
        backwards += part.rows
        at = part.before
        if at is None:
            break
    assert backwards[::-1] == fitting


def test_rows_are_found_backwards_by_step_and_wish(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    append(path, *({"step": step, "odd": step % 2} for step in range(1000)))
    part = newest(path, 2, wanted=lambda row: row["odd"] == 1)
    assert [row["step"] for row in part.rows] == [999, 997]
    part = newest(path, 2, before=part.before, wanted=lambda row: row["odd"] == 1)
    assert [row["step"] for row in part.rows] == [995, 993]
    assert newest(path, 5000, least_step=990).before is None
    assert [row["step"] for row in newest(path, 5000, least_step=998).rows] == [999, 998]
    # a place within a line, as after the file was cut back
    assert [row["step"] for row in newest(path, 1, before=30).rows] == [0]
    assert newest(path, 1, before=10**12).rows == newest(path, 1).rows


@pytest.mark.parametrize(
    "line",
    ["not json", "[1]", '{"reward": 1}', '{"step": "1"}', "[" * 100_000, "\x00\x00",
     '{"step": 1, "reward": 1' + "0" * 400 + "}"],
)  # fmt: skip
def test_lines_that_are_no_rows_are_counted_and_said(tmp_path: Path, line: str) -> None:
    folder = run_folder(tmp_path / "run", REWARDS)
    append(folder / "metrics.jsonl", line + "\n", {"step": 11, "reward": 9.0})
    append(folder / "samples.jsonl", line + "\n")
    text = seen(folder)
    assert "1 lines of metrics.jsonl are not readable" in text
    assert "reward 9" in text


def test_a_long_curve_is_thinned_and_keeps_its_extremes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_MOST_POINTS", 100)
    folder = run_folder(tmp_path / "run", [])
    run = Followed(folder, "run")
    for start in range(0, 2000, 50):
        rows = [{"step": s, "reward": 99.0 if s == 777 else 0.0} for s in range(start, start + 50)]
        append(folder / "metrics.jsonl", *rows)
        run.catch_up()
    assert len(run.curves["reward"]) <= 100
    assert max(y for _, y in run.curves["reward"]) == 99.0
    assert run.step == 1999


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_are_opened(tmp_path: Path, kind: str) -> None:
    folder = run_folder(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.unlink()
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(PostgradError, match=r"cannot read .*metrics\.jsonl"):
        seen(folder)


def test_a_run_says_how_it_ended(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        assert state_of(tmp_path).name == "running"
    assert state_of(tmp_path).name == "finished"
    with RunFolder(tmp_path) as run:
        run.stopped = True
    assert state_of(tmp_path).name == "stopped"
    with pytest.raises(PostgradError), RunFolder(tmp_path):
        raise PostgradError("step 3: loss is nan")
    assert state_of(tmp_path) == following.State("failed", "step 3: loss is nan")
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path):
        raise KeyboardInterrupt
    assert state_of(tmp_path).name == "stopped"


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    say(tmp_path, "running", process=program.pid)
    assert state_of(tmp_path).name == "running"
    program.communicate(b"\n")
    assert state_of(tmp_path).name == "killed"
    say(tmp_path, "running", process=program.pid, host="another machine")
    assert state_of(tmp_path).name == "running"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running"}', '{"state": 1, "why": 2}'])
def test_a_status_that_cannot_be_read_is_unknown(tmp_path: Path, text: str) -> None:
    assert state_of(tmp_path).name == "unknown"
    (tmp_path / "status.json").write_text(text, encoding="utf-8")
    assert state_of(tmp_path).name == "unknown"


def test_the_important_curves_come_first_and_others_by_name(tmp_path: Path) -> None:
    rows = [
        {"step": s, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "reward": s, "time/step": 1, "loss": 0}
        for s in range(1, 9)
    ]
    folder = run_folder(tmp_path / "run", rows, steps=8)
    say(folder, "finished")
    text = seen(folder)
    assert "run  grace  finished  step 8 of 8" in text
    titles = re.findall(r"^ ?(\w[\w /]*?) +[−\d.]+ {2,}(\w[\w /]*?) +[−\d.]+ *$", text, re.M)
    assert titles == [("reward", "loss"), ("a", "b"), ("c", "d")]
    text = seen(folder, metrics=["e", "time/*"])
    assert re.search(r"^e 5 +time / step 1 *$", text, re.M)
    assert "reward" not in text
    with pytest.raises(PostgradError, match="unknown metric 'rewart': did you mean 'reward'"):
        seen(folder, metrics=["rewart"])


def test_a_rising_curve_rises_from_left_to_right(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", REWARDS)
    mark = r"[\u2801-\u28ff]"
    for width in (44, 20):
        lines = seen(folder, width=width, metrics=["reward"]).splitlines()
        rows = [line for line in lines if re.search(mark, line)]
        starts = [re.search(mark, line).start() for line in rows]  # type: ignore[union-attr]
        assert starts == sorted(starts, reverse=True)
        assert all(len(line) <= width for line in lines)
        if width == 44:
            assert len(rows) == 7
            assert rows[0].strip().startswith("1.05")


def test_runs_are_drawn_over_one_another(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "first", REWARDS)
    second = run_folder(tmp_path / "second", [{**row, "reward": 3.0} for row in REWARDS])
    text = seen(first, second, metrics=["reward"])
    assert "● first" in text
    assert "● second" in text
    assert re.search(r"^reward 1 3 *$", text, re.M)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [*REWARDS, {"step": 11, "reward": float("nan")}])
    assert "reward 1 (some not finite)" in seen(folder, metrics=["reward"])
    assert "reward 1!" in seen(folder, metrics=["reward"], width=20)


def test_a_folder_that_is_no_run_yet_is_waited_for(tmp_path: Path) -> None:
    waits: list[float] = []

    def begins(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            run_folder(tmp_path / "run", REWARDS)

    text = seen(tmp_path / "run", patience=60.0, sleep=begins)
    assert "waiting for" in text
    assert "step 10 of 4" in text
    assert waits == [2.0, 2.0, 2.0]
    with pytest.raises(PostgradError, match=r"none is not a run folder$"):
        seen(tmp_path / "none")
    with pytest.raises(PostgradError, match=r"none is not a run folder after 0\.01 seconds"):
        seen(tmp_path / "none", patience=0.01, every=0.02)


def test_a_run_is_followed_until_it_ends(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", REWARDS[:1])
    say(folder, "running")
    looks: list[float] = []

    def goes_on(seconds: float) -> None:
        looks.append(seconds)
        append(folder / "metrics.jsonl", REWARDS[len(looks)])
        if len(looks) == 9:
            say(folder, "failed", why="step 11: reward is nan")

    text = seen(folder, terminal=True, every=5.0, sleep=goes_on)
    assert looks == [5.0] * 9
    for step in range(1, 10):
        assert f"running  step {step} of 4" in text
    # the last frame stays when the screen is given back
    final = text.rpartition("\x1b[?1049l")[2]
    assert "failed  step 10 of 4" in final
    assert "step 11: reward is nan" in final


def test_the_command_prints_once_where_there_is_no_terminal(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", REWARDS, [{"step": 9, "prompt": "p", "reward": 0.5}])
    say(folder, "running")
    result = CliRunner().invoke(main, ["watch", str(folder), "--metrics", "reward, loss"])
    assert result.exit_code == 0
    assert "running" in result.stdout
    assert "sample of step 9 · reward 0.5000" in result.stdout
    result = CliRunner().invoke(main, ["watch", str(tmp_path / "none"), "--once"])
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'none'} is not a run folder\n"


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_texts_are_seen_as_they_are_in_the_terminal(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": text, "response": text, text[:50]: text, "reward": 1.0}
    live = Terminal(10, 0)
    live.samples(1, [row])
    live.say(text[:500])
    printed = capsys.readouterr().err
    metrics = [{"step": s, f"reward/{text[:20]}": 1.0} for s in (1, 2, 3)]
    folder = run_folder(tmp_path / "run", metrics, [{"step": 3, **row}])
    say(folder, "failed", why=text[:500])
    watched = seen(folder, width=200)
    printed_to_terminal = seen(folder, width=200, terminal=True, once=True)
    beginning = visible(text[:40])
    for shown in (printed, watched, printed_to_terminal):
        assert visible(shown) == shown
        assert beginning in shown
        assert len(shown) < 60_000


def test_a_terminal_that_lacks_characters_is_written_to_all_the_same(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", REWARDS, [{"step": 9, "response": "naïve \ud83d"}])
    code = "from postgrad.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "watch", str(folder)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert b"na\\xefve \\ud83d" in result.stdout
    assert b"****" in result.stdout
