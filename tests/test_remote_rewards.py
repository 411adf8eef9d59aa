"""Async reward functions and reward servers: side by side, in order, and in every way astray."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest

from language_runs import SMALL, assert_same_run
from postgrad.api import resume, train
from postgrad.errors import NonFinite, PostgradError
from postgrad.notices import heard_by
from postgrad.rewards import load_rewards, remote

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)


@contextmanager
def serving(answer, port=0):
    """A server; `answer(asked, handler)` gives status, body and headers. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            status, body, headers = answer(json.loads(self.rfile.read(length)), self)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def rewards(values):
    return 200, json.dumps({"rewards": values}).encode(), {}


def lengths(asked, handler=None):
    return rewards([len(text) for text in asked["completions"]])


def ask(spec, completions, **columns):
    return load_rewards(spec)(["p"] * len(completions), completions, columns)[0]


def test_a_server_gets_all_and_answers_in_order():
    seen = []
    last_first = threading.Barrier(3)

    def answer(asked, handler):
        seen.append(asked)
        last_first.wait(10)  # three requests must be under way at once
        if "1" in asked["completions"]:
            time.sleep(0.05)
        return rewards([int(text) + int(more) for text, more in zip(
            asked["completions"], asked["columns"]["more"], strict=True)])  # fmt: skip

    with serving(answer) as url:
        spec = {"name": "sum", "url": url, "batch": 2, "weight": 2}
        values = load_rewards(spec)(
            ["p", [{"role": "user", "content": "é"}], "q", "r", "s"], list("12345"),
            {"more": [10, 20, 30, 40, 50]},
        )  # fmt: skip
    assert values == ([22, 44, 66, 88, 110], {"sum": [11, 22, 33, 44, 55]})
    first = next(asked for asked in seen if asked["completions"] == ["1", "2"])
    assert first == {
        "prompts": ["p", [{"role": "user", "content": "é"}]],
        "completions": ["1", "2"],
        "columns": {"more": [10, 20]},
    }
    assert sorted(len(asked["completions"]) for asked in seen) == [1, 2, 2]


def test_no_more_requests_at_a_time_than_told():
    now, most, lock = 0, 0, threading.Lock()

    def answer(asked, handler):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return lengths(asked)

    with serving(answer) as url:
        assert ask({"url": url, "batch": 1, "concurrency": 2}, ["a", "bb", "ccc", "d"]) == [
            1, 2, 3, 1,
        ]  # fmt: skip
    assert most == 2


def test_only_the_columns_asked_for_are_sent():
    with serving(lambda asked, _: rewards([sorted(asked["columns"]) == ["a"]])) as url:
        assert ask({"url": url, "columns": ["a"]}, ["x"], a=[1], b=[object()]) == [1.0]
        with pytest.raises(PostgradError, match=r"score': b cannot be sent as JSON .*columns:"):
            ask(url, ["x"], a=[1], b=[object()])
        with pytest.raises(PostgradError, match="needs the column 'c'; the data has the columns a"):
            ask({"url": url, "columns": ["c"]}, ["x"], a=[1])


RUBBISH = {
    "no JSON": ((200, b"<html>Oops</html>", {}), "the answer is not JSON: <html>Oops</html>"),
    "nothing": ((200, b"", {}), "the answer is not JSON: nothing"),
    "too few": (rewards([1.0]), "1 rewards came, expected 2"),
    "too many": (rewards([1.0] * 3), "3 rewards came, expected 2"),
    "other JSON": ((200, b'{"scores": [1, 2]}', {}), r'expected {"rewards": \[...\]}, got {"sco'),
    "a list": ((200, b"[1, 2]", {}), r"expected {.*}, got \[1, 2\]"),
    "deep JSON": ((200, b"[" * 100_000, {}), "the answer is not JSON"),
    "no UTF-8": ((200, b"\xff\xfe", {}), "the answer is not JSON"),
    "redirect": (
        (307, b"", {"Location": "http://elsewhere/?key=1"}),
        "status 307 .*redirects to 'http://elsewhere/': give the final address",
    ),
    "not found": ((404, b"<h1>none\nhere</h1>", {}), "status 404 Not Found: <h1>none here</h1>"),
    "no entry": ((401, b"", {}), "401.*read from the variable POSTGRAD_REWARD_TOKEN"),
    "endless": ((200, b" " * (9 << 20), {}), "answered with more than 8 MiB"),
    "compressed": ((200, b"\x1f\x8b\x08", {"Content-Encoding": "gzip"}), "the answer is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUBBISH)
def test_rubbish_is_one_line_that_names_server_completions_and_what_came(case):
    answer, message = RUBBISH[case]
    asked = []
    with serving(lambda request, _: asked.append(1) or answer) as url:
        with pytest.raises(PostgradError, match=message) as caught:
            ask({"url": url, "name": "judge"}, ["a", "b"])
        assert str(caught.value).startswith(f"reward 'judge' at {url}, completions 1 to 2: ")
    assert "\n" not in str(caught.value)
    assert len(asked) == 1  # such an answer is not asked for again


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1.0, float("nan")], NonFinite, "returned nan for completion 2"),
        ([1.0, float("inf")], NonFinite, "returned inf for completion 2"),
        ([1.0, 10**400], NonFinite, "returned inf for completion 2"),
        ([1.0, "1"], PostgradError, r"returned '1' \(str\) for completion 2"),
        ([1.0, None], PostgradError, "returned None for completion 2"),
        ([[1.0], 2.0], PostgradError, r"returned \[1.0\] \(list\) for completion 1"),
    ],
)
def test_rewards_that_are_no_finite_numbers(values, kind, message):
    with serving(lambda *_: rewards(values)) as url, pytest.raises(kind, match=message):
        ask({"url": url, "name": "judge"}, ["a", "b"])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(status):
    tries = []

    def answer(asked, handler):
        tries.append(asked)
        return lengths(asked) if len(tries) == 3 else (status, b"busy", {})

    heard = []
    with serving(answer) as url, heard_by(heard.append):
        assert ask({"url": url, "name": "judge"}, ["abc"]) == [3]
    assert len(tries) == 3
    assert len(heard) == 2
    assert re.fullmatch(
        rf"reward 'judge': status {status} .*: busy; asking again in 0.01 s", heard[0]
    )
    assert heard[1].endswith("0.02 s")


def test_the_servers_own_pause_is_kept():
    first = [True]

    def answer(asked, handler):
        return (429, b"", {"Retry-After": "1"}) if first and first.pop() else lengths(asked)

    heard = []
    with serving(answer) as url, heard_by(heard.append):
        assert ask(url, ["ab"]) == [2]
    assert heard[0].endswith("asking again in 1 s")


def test_after_the_last_try_the_line_says_how_often():
    tries = r"completion 1: status 503 .*\(3 tries in 0 s\)"
    with serving(lambda *_: (503, b"", {})) as url, pytest.raises(PostgradError, match=tries):
        ask({"url": url, "retries": 2}, ["a"])


def test_a_server_that_is_down_and_one_that_comes_back():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/score"
    with pytest.raises(PostgradError, match=r"completion 1: no answer \(.*\) \(2 tries"):
        ask({"url": url, "retries": 1}, ["a"])

    down = threading.Event()  # the first try has failed
    values = []
    with heard_by(lambda line: down.set()):
        asking = threading.Thread(target=lambda: values.extend(ask(url, ["a", "bb"])))
        asking.start()
        assert down.wait(10)
        with serving(lengths, port):
            asking.join(20)
    assert values == [1, 2]


def test_a_connection_that_breaks_off_is_tried_again():
    tries = []

    def answer(asked, handler):
        tries.append(1)
        if len(tries) == 1:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
        return lengths(asked)

    with serving(answer) as url:
        assert ask(url, ["abcd"]) == [4]


@pytest.mark.parametrize("slow", ["silent", "dripping"])
def test_a_server_that_never_ends_is_left_at_its_limit(slow):
    release = threading.Event()

    def answer(asked, handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while slow == "dripping" and not release.wait(0.02):
            handler.wfile.write(b" ")
        release.wait()
        return 200, b"", {}

    with serving(answer) as url:
        with pytest.raises(PostgradError, match=r"no answer within its limit of 0\.2 seconds"):
            ask({"url": url, "time_limit": 0.2, "retries": 0}, ["a"])
        release.set()


def test_the_token_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("POSTGRAD_REWARD_TOKEN", "s3cret-one")
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret-two")
    came = []

    def answer(asked, handler):
        came.append(handler.headers["Authorization"])
        return 400, f"your {came[-1]} is wrong".encode(), {}

    with serving(answer) as url:
        for more in ({}, {"token_variable": "JUDGE_TOKEN"}):
            with pytest.raises(PostgradError, match=r"your Bearer \*\*\* is wrong"):
                ask({"url": url, **more}, ["a"])
    assert came == ["Bearer s3cret-one", "Bearer s3cret-two"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"url": "http://"}, "expected an address such as"),
        ({"url": "localhost:8000"}, "expected an address such as"),
        ({"url": ""}, "url: string should have at least 1"),
        ("http://host:port/score", "[Pp]ort"),
        ("http://me:hunter2@host/score", "reward server host: its address holds a password"),
        ({"url": "http://host/", "batch": 0}, "'http://host/': batch: .*greater than 0, got 0"),
        ({"url": "http://host/", "retrys": 1}, "unknown key 'retrys': did you mean 'retries'"),
        ({"url": "http://host/", "token": "x"}, "unknown key 'token': did you mean 'token_var"),
        ({"url": "http://h/", "token_variable": "NO_SUCH_VARIABLE"}, "has no NO_SUCH_VARIABLE"),
        ("http://host/*heavy", "weight must be a finite number, got 'heavy'"),
        (["http://host/", "http://host/*2"], "reward 'host/' is listed 2 times"),
    ],
)
def test_specifications_that_are_refused(spec, message):
    with pytest.raises(PostgradError, match=message) as caught:
        load_rewards(spec)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_async_functions_of_a_batch_and_of_one_item():
    together = 0
    all_there = asyncio.Event()

    async def batch(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    async def each(completion, prompt, **columns):
        nonlocal together
        together += 1
        if together == 3:
            all_there.set()
        await all_there.wait()  # three must be awaited at a time
        return len(completion) + len(prompt) + columns["bonus"]

    total, terms = load_rewards([batch, each])(
        ["p", "", "qq"], ["a", "bb", "c"], {"answer": ["a", "x", "c"], "bonus": [1, 0, 5]}
    )
    assert terms == {"batch": [1, 0, 1], "each": [3, 2, 8]}
    assert total == [4, 2, 9]
    assert list(terms) == ["batch", "each"]


def test_terms_run_side_by_side():
    here, there = threading.Event(), threading.Event()

    async def background(completions):
        here.set()
        while not there.is_set():
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    def plain(completions):
        assert here.wait(10)  # the async one, listed after this, has begun
        return [2.0] * len(completions)

    def answer(asked, handler):
        there.set()
        return lengths(asked)

    with serving(answer) as url:
        specs = [plain, background, {"name": "server", "url": url}]
        _, terms = load_rewards(specs, time_limit=10)(["p"], ["abc"], {})
    assert terms == {"plain": [2.0], "background": [1.0], "server": [3]}


def test_async_functions_share_one_event_loop():
    loops = []

    async def score(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for _ in range(2):
        load_rewards(score)(["p"], ["a"], {})
    assert loops[0] is loops[1]


def test_errors_of_async_functions():
    async def raises(completions):
        raise ValueError("no\nluck")

    async def leaves(completion):
        raise SystemExit(1)

    async def some(completion):
        if completion == "bad":
            raise KeyError(completion)
        return 1.0

    async def text(completion):
        return "1"

    async def own_timeout(completions):
        raise TimeoutError("the API was slow")

    for function, message in (
        (
            raises,
            r"reward 'raises' raised ValueError: no luck \(test_remote_rewards.py, line \d+\)",
        ),
        (leaves, "reward 'leaves', completion 1, raised SystemExit: 1"),
        (some, r"reward 'some', completion 2, raised KeyError: 'bad' \(test_remote"),
        (text, r"returned '1' \(str\) for completion 1"),
        (own_timeout, "raised TimeoutError: the API was slow"),
    ):
        with pytest.raises(PostgradError, match=message):
            load_rewards(function)(["p"] * 3, ["a", "bad", "bad"], {})

    async def needs(completion, answer):
        return 1.0

    with pytest.raises(PostgradError, match="needs the column 'answer'"):
        load_rewards(needs)(["p"], ["a"], {})


def test_an_async_function_is_cancelled_at_its_limit():
    cancelled = threading.Event()

    async def hangs(completion):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(PostgradError, match=r"'hangs' did not return within its limit of 0\.05 s"):
        load_rewards(hangs, time_limit=0.05)(["p"], ["a"], {})
    assert cancelled.wait(10)


def test_a_function_that_blocks_the_event_loop_does_not_spoil_later_calls():
    release = threading.Event()

    async def blocks(completions):
        release.wait()

    async def well(completions):
        return [1.0]

    with pytest.raises(PostgradError, match="did not return within its limit"):
        load_rewards(blocks, time_limit=0.05)(["p"], ["a"], {})
    assert load_rewards(well)(["p"], ["a"], {})[0] == [1.0]
    release.set()


def test_a_plain_error_cancels_what_is_in_the_background():
    cancelled = threading.Event()

    async def waits(completions):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def fails(completions):
        raise ValueError("no")

    with pytest.raises(PostgradError, match="'fails' raised ValueError: no"):
        load_rewards([waits, fails])(["p"], ["a"], {})
    assert cancelled.wait(10)


GRPO = {
    **SMALL,
    "data": {"name": "addition", "settings": {"size": 16}},
    "batch_size": 2,
    "rollout": {"samples": 2, "max_new_tokens": 3},
    "eval_size": 2,
    "steps": 4,
    "sample_every": 1,
    "save_every": 3,
}


def odd_lengths(asked, handler=None):
    return rewards([sum(map(ord, text)) % 7 for text in asked["completions"]])


def test_a_run_that_its_server_left_resumes_to_the_bit(tmp_path):
    gone = threading.Event()
    calls = []

    def answer(asked, handler):
        calls.append(1)
        if gone.is_set() and len(calls) > 5:  # in the middle of a step
            return 200, b"rubbish", {}
        return odd_lengths(asked)

    with serving(answer) as url:
        reward = {"name": "judge", "url": url, "batch": 2, "retries": 0}
        train("grpo", output=tmp_path / "whole", reward=reward, **GRPO)
        calls.clear()
        gone.set()
        with pytest.raises(PostgradError, match=r"step \d: reward 'judge' .*rubbish; once mended"):
            train("grpo", output=tmp_path / "parts", reward=reward, **GRPO)
        gone.clear()
        resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    samples = [(tmp_path / run / "samples.jsonl").read_bytes() for run in ("whole", "parts")]
    assert samples[0] == samples[1]


def test_the_server_of_the_documentation(tmp_path):
    page = (DOCS / "rewards.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# server\.py\n(.*?)```", page, re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "server.py").write_text(code.replace("8000", str(port)))
    process = subprocess.Popen([sys.executable, tmp_path / "server.py"], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/score"
        assert ask({"url": url, "batch": 1}, ["abcd", "ab"]) == [0, -2]
    finally:
        process.kill()
        process.wait()


def test_the_client_is_the_one_that_the_extra_names():
    assert int(httpx2.__version__.split(".")[0]) >= 2


def test_before_a_run_a_server_that_is_away_is_soon_given_up():
    with serving(lengths) as url:
        pass
    with pytest.raises(PostgradError, match=r"no answer .*\(3 tries in"):
        load_rewards(url).probe({"prompt": "a"})


def test_during_a_run_it_is_waited_for_as_long_as_was_told():
    tried = []

    def answer(asked, handler):
        tried.append(asked)
        return (503, b"", {"Retry-After": "0"}) if len(tried) in (2, 3, 4, 5) else lengths(asked)

    with serving(answer) as url:
        reward = load_rewards({"url": url, "name": "slow", "retries": 4})
        assert reward.probe({"prompt": "a", "answer": "abc"}) == {"slow": 3.0}
        with pytest.raises(PostgradError, match="status 503"):
            load_rewards({"url": url, "retries": 1}).probe({"prompt": "a"})
        assert len(tried) == 3
        assert reward(["p"], ["four"], {})[0] == [4.0]
    assert len(tried) == 6
