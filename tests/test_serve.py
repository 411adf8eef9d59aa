"""`postgrad serve`: what its pages show, what it keeps to itself, and that texts stay texts."""

import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from postgrad.access import Access
from postgrad.errors import PostgradError
from postgrad.reports import following, serve
from postgrad.reports.serve import Filter, Shelf, application
from postgrad.visible import visible
from run_folders import HOSTILE_TEXTS, METRICS, RUN, Page, run_folder

TOKEN = "abcdefgh12345678"


class Answer:
    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes):
        self.status = status
        self.headers = {name.decode(): value.decode() for name, value in headers}
        self.text = body.decode()
        self.page = Page(self.text)
        self.words = " ".join(self.page.text.split())

    @property
    def samples(self) -> list[dict[str, Any]]:
        return list(json.loads(self.page.scripts[0]))

    def every(self) -> float:
        live = next(a for _, a in self.page.elements if a.get("id") == "live")
        return float(str(live["data-every"]))


def ask(app: Any, path: str, method: str = "GET", **headers: str) -> Answer:
    """The application's answer to a request."""
    path, _, query = path.partition("?")
    headers = {"host": "127.0.0.1:8420"} | {k.replace("_", "-"): v for k, v in headers.items()}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", 8420),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in messages[1:])
    return Answer(messages[0]["status"], messages[0]["headers"], body)


def say(folder: Path, state: str, why: str = "") -> None:
    status = {"state": state, "why": why, "host": platform.node(), "process": os.getpid()}
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")


def append(path: Path, *rows: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs, one of them deeper, and what is no run."""
    root = tmp_path / "runs"
    root.mkdir()
    say(run_folder(root / "one", METRICS), "finished")
    say(run_folder(root / "two", METRICS, run={**RUN, "method": "dpo"}, steps=9), "running")
    (root / "compare").mkdir()
    say(run_folder(root / "compare" / "three", METRICS), "failed", "step 5: loss is nan")
    (root / "empty").mkdir()
    (root / ".hidden").mkdir()
    run_folder(root / ".hidden" / "four")
    return root


@pytest.fixture
def app(runs: Path) -> Any:
    return application(Shelf([runs]), Access("127.0.0.1"))


def test_the_list_shows_every_run_with_its_state(app: Any) -> None:
    answer = ask(app, "/")
    assert answer.status == 200
    assert "runs/one curves samples finished grace smollm2 4 2026-05-04 09:12" in answer.words
    assert "runs/two curves samples running dpo smollm2 4 of 9 2026-05-04 09:12" in answer.words
    assert "runs/compare/three curves samples failedstep 5: loss is nan grace" in answer.words
    assert "four" not in answer.words
    assert answer.every() == 3.0
    found = ask(app, "/?q=THREE")
    assert "1 runs" in found.words
    assert "runs/one" not in found.words


def test_the_newest_run_is_first_and_a_list_has_pages(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate(["one", "compare/three", "two"]):
        os.utime(runs / name / "run.json", (1000 + i, 1000 + i))
    monkeypatch.setattr(serve, "_RUNS", 2)
    app = application(Shelf([runs]), Access("127.0.0.1"))
    first = ask(app, "/")
    names = [a["value"] for a in first.page.all("input") if a.get("name") == "run"]
    assert names == ["runs/two", "runs/compare/three"]
    (link,) = re.findall(r'<a href="(\?[^"]*)">Older runs', first.text)
    second = ask(app, f"/{link.replace('&amp;', '&')}")
    assert [a["value"] for a in second.page.all("input") if a.get("name") == "run"] == ["runs/one"]
    assert "Older runs" not in second.text


def test_a_run_that_begins_later_is_found(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf([runs])
    assert len(shelf.runs()) == 3
    run_folder(runs / "late")
    now = serve.time.monotonic()
    monkeypatch.setattr(serve.time, "monotonic", lambda: now + 5)
    assert "runs/late" in shelf.runs()


def test_folders_of_the_same_name_and_a_run_itself(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "runs").mkdir(parents=True)
        run_folder(tmp_path / place / "runs" / "one")
    shelf = Shelf([tmp_path / "a/runs", tmp_path / "b/runs", tmp_path / "a/runs/one"])
    assert set(shelf.runs()) == {"runs/one", "runs/one'", "one"}
    with pytest.raises(PostgradError, match=r"nowhere is not a folder"):
        Shelf([tmp_path / "nowhere"])


def drawn(answer: Answer) -> dict[str, Any]:
    return {
        str(a["aria-label"]): json.loads(str(a["data-hover"]))["series"]
        for a in answer.page.all("svg")
    }


def test_curves_of_several_runs_lie_over_one_another(app: Any, runs: Path) -> None:
    append(runs / "two" / "metrics.jsonl", {"step": 5, "loss": 7.0, "reward": 8.0})
    answer = ask(app, "/curves?run=runs/one&run=runs/two")
    figures = drawn(answer)
    assert list(figures)[:4] == ["evaluation / mrr", "evaluation / loss", "reward", "loss"]
    assert [line["name"] for line in figures["reward"]] == ["runs/one", "runs/two"]
    assert [point[3] for point in figures["reward"][1]["at"]] == ["1", "2", "3", "4", "8"]
    assert answer.every() == 3.0
    only = drawn(ask(app, "/curves?run=runs/one&metrics=" + quote("loss, evaluation/*")))
    assert list(only) == ["evaluation / mrr", "evaluation / loss", "loss"]
    assert ask(app, "/curves?run=runs/one").every() == 0
    assert "No values of such metrics yet." in ask(app, "/curves?run=runs/one&metrics=x").words


def test_curves_follow_a_run_that_grows_and_is_cut_back(app: Any, runs: Path) -> None:
    path = runs / "two" / "metrics.jsonl"

    def rewards() -> list[str]:
        (line,) = drawn(ask(app, "/curves?run=runs/two&metrics=reward"))["reward"]
        return [point[3] for point in line["at"]]

    assert rewards() == ["1", "2", "3", "4"]
    append(path, {"step": 5, "reward": 50.0})
    assert rewards()[-1] == "50"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.with_suffix(".rewriting").write_text("".join(lines[:3]), encoding="utf-8")
    path.with_suffix(".rewriting").replace(path)
    assert rewards() == ["1", "2"]


def test_no_request_reads_a_whole_file(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 2000
    monkeypatch.setattr(following.Tail.read, "__defaults__", (piece,))
    monkeypatch.setattr(following.newest, "__kwdefaults__",
                        {**(following.newest.__kwdefaults__ or {}), "most": piece})  # fmt: skip
    append(runs / "two/metrics.jsonl", *({"step": s, "reward": s} for s in range(5, 3000)))
    append(runs / "two/samples.jsonl", *({"step": s, "prompt": "x" * 50} for s in range(3000)))
    shelf = Shelf([runs])
    app = application(shelf, Access("127.0.0.1"))
    first = drawn(ask(app, "/curves?run=runs/two&metrics=reward"))["reward"][0]["at"]
    run = shelf.follow("runs/two")
    assert 4 < len(first) < 200
    assert run.behind > 50_000
    answer = ask(app, "/samples?run=runs/two")
    assert [row["step"] for row in answer.samples] == list(range(2999, 2974, -1))
    nothing = ask(app, "/samples?run=runs/two&text=y")
    assert "search further back" in nothing.words
    (link,) = re.findall(r'<a href="(\?[^"]*before=(\d+))">None', nothing.text)
    size = (runs / "two/samples.jsonl").stat().st_size
    assert size - int(link[1]) <= serve._PIECES * piece


SAMPLES = [
    {"step": step, "prompt": f"question {step}", "response": f"Answer {i}", "reward": i / 4}
    for step in range(1, 11)
    for i in range(5)
]


def steps_and_rewards(app: Any, **query: Any) -> list[tuple[int, float]]:
    answer = ask(app, "/samples?" + urlencode({"run": "runs/one", **query}))
    assert answer.status == 200, answer.words
    return [(row["step"], dict(row["numbers"])["reward"]) for row in answer.samples]


def test_samples_are_shown_newest_first_and_filtered(app: Any, runs: Path) -> None:
    append(runs / "one/samples.jsonl", *SAMPLES)
    newest_first = [(row["step"], row["reward"]) for row in reversed(SAMPLES)]
    assert steps_and_rewards(app) == newest_first[:25]
    assert steps_and_rewards(app, step_from=3, step_to=4) == newest_first[30:40]
    assert steps_and_rewards(app, reward_from=0.9) == [(s, 1.0) for s in range(10, 0, -1)]
    assert steps_and_rewards(app, reward_to=0, step_from=9) == [(10, 0.0), (9, 0.0)]
    assert steps_and_rewards(app, text="ANSWER 3", step_to=2) == [(2, 0.75), (1, 0.75)]
    assert steps_and_rewards(app, text="question 7", reward_from=1) == [(7, 1.0)]
    assert steps_and_rewards(app, text="nowhere") == []


def test_older_samples_are_a_link_away(app: Any, runs: Path) -> None:
    append(runs / "one/samples.jsonl", *SAMPLES)
    answer = ask(app, "/samples?run=runs/one")
    (link,) = re.findall(r'<a href="(\?[^"]*)">Older samples', answer.text)
    older = ask(app, "/samples" + link.replace("&amp;", "&"))
    assert [row["step"] for row in answer.samples + older.samples] == [
        row["step"] for row in reversed(SAMPLES)
    ]
    assert "Older samples" not in older.text
    assert "Back to the newest" in older.text


def test_a_filter_looks_into_turns_and_across_tokens() -> None:
    turns = {"step": 1, "prompt": [{"role": "user", "content": "What is it?"}]}
    assert Filter(text="what IS")(turns)
    assert Filter(text="hello")({"step": 1, "tokens": ["he", "llo"], "advantages": [1.0, 2.0]})
    assert not Filter(text="user content")(turns)
    assert not Filter(reward_from=0)({"step": 1})
    assert not Filter(reward_from=0)({"step": 1, "reward": float("nan")})


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/curves", "choose one or more runs first"),
        ("/curves?run=runs/on", "unknown run 'runs/on': did you mean 'runs/one'?"),
        ("/samples", "unknown run ''"),
        ("/samples?run=runs/one&step_from=x", "step from: expected a number, got 'x'"),
        ("/samples?run=runs/one&reward_to=nan", "reward to: expected a number, got 'nan'"),
        ("/samples?run=runs/one&before=1e999", "before: expected a number"),
        ("/?start=inf", "start: expected a number"),
    ],
)
def test_a_mistake_is_one_sentence(app: Any, path: str, why: str) -> None:
    answer = ask(app, path)
    assert answer.status == 400
    assert why in answer.words


SECRET = "the secret of the house"


@pytest.mark.parametrize(
    "name",
    ["../secret", "runs/../../secret", "/etc", "runs/one/../../../secret", "..%2fsecret", "secret",
     "runs/one\x00", "runs//one", "runs/one/"],
)  # fmt: skip
def test_no_request_leaves_the_folders(app: Any, runs: Path, name: str) -> None:
    run_folder(runs.parent / "secret", samples=[{"step": 1, "prompt": SECRET}])
    for path in ("/samples?run=", "/curves?run="):
        answer = ask(app, path + quote(name))
        assert answer.status == 400
        assert SECRET not in answer.text
    for path in (f"/assets/{name}", "/assets/../serve.py", f"/{name}", "/assets/%2e%2e/serve.py"):
        assert ask(app, path).status == 404


def test_links_out_of_the_folders_are_not_followed(app: Any, runs: Path) -> None:
    secret = run_folder(
        runs.parent / "secret", [{"step": 77, "reward": 1}], [{"step": 1, "prompt": SECRET}]
    )
    (runs / "linked").symlink_to(secret)
    (runs / "inner").mkdir()
    (runs / "inner" / "deep").symlink_to(runs.parent)
    for name in ("metrics.jsonl", "samples.jsonl", "status.json"):
        (runs / "one" / name).unlink(missing_ok=True)
        (runs / "one" / name).symlink_to(secret / name)
    listed = ask(app, "/")
    assert "linked" not in listed.words
    assert "secret" not in listed.words.replace(str(runs / "one"), "")
    assert "cannot read" in listed.words
    for path in ("/samples?run=runs/one", "/curves?run=runs/one"):
        answer = ask(app, path)
        assert answer.status == 400
        assert "cannot read" in answer.words
        assert SECRET not in answer.text


def test_a_run_that_became_a_link_is_refused(app: Any, runs: Path) -> None:
    secret = run_folder(runs.parent / "secret", samples=[{"step": 1, "prompt": SECRET}])
    assert ask(app, "/").status == 200
    (runs / "one").rename(runs / "was")
    (runs / "one").symlink_to(secret)
    answer = ask(app, "/samples?run=runs/one")
    assert answer.status == 400
    assert SECRET not in answer.text


@pytest.mark.parametrize("path", ["/", "/curves?run=runs/one", "/samples?run=runs/one", "/x"])
def test_every_answer_forbids_what_it_does_not_need(app: Any, path: str) -> None:
    headers = ask(app, path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/", "/curves?run=runs/one", "/samples?run=runs/one"])
def test_pages_load_nothing_but_the_package_and_have_no_inline_script(
    app: Any, runs: Path, path: str
) -> None:
    append(runs / "one/samples.jsonl", *SAMPLES)
    answer = ask(app, path)
    links = [str(a["href"]) for a in answer.page.all("link") if a["href"] != "data:,"]
    sources = [str(a["src"]) for a in answer.page.all("script") if "src" in a]
    assert len(links) == 3
    assert len(sources) == 4
    for address in links + sources:
        loaded = ask(app, address)
        assert loaded.status == 200
        kind = "text/css" if address.endswith("css") else "text/javascript"
        assert loaded.headers["content-type"].startswith(kind)
        assert "@import" not in loaded.text
        assert "url(" not in loaded.text
    for attributes in answer.page.all("script"):
        assert "src" in attributes or attributes["type"] == "application/json"
    for _, attributes in answer.page.elements:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(app: Any, method: str) -> None:
    assert ask(app, "/", method).status == 405


def test_other_names_and_other_sites_are_refused(app: Any) -> None:
    assert ask(app, "/", host="evil.com").status == 421
    assert ask(app, "/", sec_fetch_site="cross-site", sec_fetch_mode="cors").status == 403
    assert ask(app, "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200


def test_a_link_with_the_token_opens_the_pages(runs: Path) -> None:
    app = application(Shelf([runs]), Access("0.0.0.0", TOKEN, "postgrad_8420"))
    for path in ("/", "/curves?run=runs/one", "/assets/page.css", "/?token=wrong"):
        answer = ask(app, path, host="cluster:8420")
        assert answer.status == 401
        assert "runs/one" not in answer.text
    opened = ask(app, f"/curves?run=runs/one&token={TOKEN}", host="cluster:8420")
    assert opened.status == 303
    assert opened.headers["location"] == "/curves?run=runs%2Fone"
    cookie = opened.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    shown = ask(app, "/", host="cluster:8420", cookie=cookie.partition(";")[0])
    assert "runs/one" in shown.words
    assert ask(app, "/", host="cluster:8420", authorization=f"Bearer {TOKEN}").status == 200
    away = ask(app, f"//evil.com/?token={TOKEN}", host="cluster:8420")
    assert away.headers["location"].startswith("/?")


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_texts_are_seen_as_they_are_in_the_browser(text: str, runs: Path, app: Any) -> None:
    row = {"step": 5, "prompt": text, "response": text, "tokens": [text], "advantages": [1.0]}
    append(runs / "one/samples.jsonl", row, {"step": 6, text: text})
    append(runs / "one/metrics.jsonl", {"step": 5, f"reward/{text[:99]}": 1.0})
    say(runs / "one", "failed", text[:500])
    for path in ("/", "/curves?run=runs/one&metrics=reward/*", "/samples?run=runs/one"):
        answer = ask(app, path)
        assert answer.status == 200
        assert visible(answer.text) == answer.text
        assert not {name for name, _ in answer.page.elements} & {"img", "b"}
        assert all("onload" not in attributes for _, attributes in answer.page.elements)
        assert all(visible(line["name"]) == line["name"]
                   for lines in drawn(answer).values() for line in lines)  # fmt: skip
        assert len(answer.text) < 700_000
    newer, older = answer.samples
    assert older["texts"][0][1].startswith(visible(text)[:40_000])
    assert visible(newer["texts"][0][1]) == newer["texts"][0][1]
    listed = ask(app, "/")
    assert visible(text[:500]) in listed.page.text
    searched = ask(app, "/samples?" + urlencode({"run": "runs/one", "text": "<x' \"y"}))
    assert "<x' \"y" in [a.get("value") for a in searched.page.all("input")]


@pytest.fixture
def served(runs: Path) -> Iterator[Any]:
    """Starts `postgrad serve` for real; gives what it printed and the process."""
    started = []

    def start(*words: str, **environment: str) -> tuple[str, subprocess.Popen[str]]:
        program = subprocess.Popen(
            [sys.executable, "-c", "from postgrad.cli import main; main()", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            text=True,
        )
        started.append(program)
        assert program.stdout is not None
        return program.stdout.readline(), program

    yield start
    for program in started:
        program.kill()
        program.communicate()


def test_the_command_serves_until_it_is_interrupted(runs: Path, served: Any) -> None:
    line, program = served(str(runs), "--port", "0")
    assert line.startswith("3 runs, at http://127.0.0.1:")
    (address,) = re.findall(r"http://\S+", line)
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert "runs/compare/three" in answer.read().decode()
        assert "server" not in answer.headers
    with pytest.raises(urllib.error.HTTPError, match="421"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.com"}))
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=30)
    assert (out, err, program.returncode) == ("", "", 0)


def test_the_command_demands_a_token_where_others_can_reach_it(runs: Path, served: Any) -> None:
    line, program = served(str(runs), "--port", "0", "--host", "0.0.0.0")
    port, token = re.findall(r"http://[^:]+:(\d+)/\?token=(\w{48}) ", line)[0]
    address = f"http://127.0.0.1:{port}/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(address, timeout=30)
    asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 200
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(f"{address}?token={token}", timeout=30) as answer:
        assert "runs/one" in answer.read().decode()
        assert "token" not in answer.url
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=30)
    assert token not in out + err


def test_mistakes_of_the_command_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from postgrad.cli import main

    def refused(*words: str) -> str:
        result = CliRunner().invoke(main, ["serve", *words])
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "nowhere is not a folder" in refused(str(tmp_path / "nowhere"))
    assert "MY_TOKEN: expected 16" in refused(str(tmp_path), "--token-env", "MY_TOKEN")
    assert "cannot listen at 192.0.2.1:8420" in refused(str(tmp_path), "--host", "192.0.2.1")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'postgrad[serve]'" in refused(str(tmp_path))
