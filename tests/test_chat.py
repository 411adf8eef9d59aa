"""Models that are only asked: the same answers from a process and from a server, or an error."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.models.language import load_policy
from postgrad.sampling.chat import ChatSettings, LocalChat, ServerChat, _pause, load_chat

pytest.importorskip("openai")

PROMPTS = ["what is 1 + 1?", "say a", "say b"]
DRAWN = {"max_tokens": 6, "temperature": 1.0}


@pytest.fixture(scope="module")
def local():
    return LocalChat(load_policy("tiny"))


class Server(ThreadingHTTPServer):
    """The model `tiny` behind OpenAI's chat API. `faults` are answered first, one a request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.chat = LocalChat(load_policy("tiny"))
        self.lock = threading.Lock()
        self.faults = []
        self.bodies, self.keys = [], []
        self.together = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        if server.together is not None:
            server.together.wait(10)
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["authorization"])
            if server.faults:
                return self.reply(*server.faults.pop(0))
            text = server.chat(
                [body["messages"][-1]["content"]],
                max_tokens=body["max_tokens"],
                temperature=body["temperature"],
                stop=body.get("stop", ()),
                seed=body["seed"],
            )[0][0]
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.reply(200, {"id": "0", "object": "chat.completion", "created": 0, "model": "tiny",
                         "choices": [choice]})  # fmt: skip

    def reply(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


@contextmanager
def running():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server():
    with running() as found:
        yield found


def asked(server, **settings):
    return ServerChat("tiny", server.url, **settings)


def error(status, message="busy"):
    return status, {"error": {"message": message}}


# In this process ------------------------------------------------------------------------------


def test_an_answer_depends_on_its_prompt_and_the_seed_alone():
    policy = load_policy("tiny")
    together = LocalChat(policy)(PROMPTS, n=2, **DRAWN)
    alone = [LocalChat(policy)([prompt], n=2, **DRAWN)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({text for texts in together for text in texts}) == 6
    assert LocalChat(policy)(PROMPTS, n=2, **DRAWN, seed=1) != together
    assert LocalChat(policy)(PROMPTS, **DRAWN) == [texts[:1] for texts in together]


def test_at_temperature_zero_one_answer_stands_for_all(local):
    before = local.counts.given
    (texts,) = local(["once"], n=3, max_tokens=5, seed=1)
    assert texts == [texts[0]] * 3
    assert local(["once"], max_tokens=5, seed=2) == [texts[:1]]
    assert local.counts.given == before + 1


def test_an_answer_ends_before_a_stop_string(local):
    asked = {"max_tokens": 12, "temperature": 1.0}
    ((whole,),) = local(["go"], **asked)
    assert len(set(whole)) > 6
    stop = [whole[5], whole[2:4]]
    assert local(["go"], **asked, stop=stop) == [[whole[:2]]]


def test_a_conversation_needs_a_chat_template(local):
    with pytest.raises(PostgradError, match="no chat template"):
        local([[{"role": "user", "content": "hello"}]])


# Behind a server ------------------------------------------------------------------------------


def test_a_server_gives_the_same_answers_in_order(server, local):
    assert asked(server)(PROMPTS, max_tokens=6, stop=["!"]) == local(
        PROMPTS, max_tokens=6, stop=["!"]
    )
    texts = asked(server)(PROMPTS, n=2, **DRAWN)
    again = asked(server, concurrency=1)(PROMPTS, n=2, **DRAWN)
    assert texts == again
    assert len({text for several in texts for text in several}) == 6


def test_conversations_are_sent_as_they_are(server):
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say a"}]
    asked(server)([talk, "say b"], max_tokens=3)
    sent = sorted(server.bodies, key=lambda body: len(body["messages"]))
    assert sent[0]["messages"] == [{"role": "user", "content": "say b"}]
    assert sent[1]["messages"] == talk
    assert sent[1] | {"messages": 0} == {
        "model": "tiny", "messages": 0, "max_tokens": 3, "temperature": 0, "seed": 0
    }  # fmt: skip


def test_requests_run_at_the_same_time(server):
    server.together = threading.Barrier(3)  # none is answered before all three are there
    assert len(asked(server, concurrency=3)(PROMPTS, max_tokens=2)) == 3


def test_a_busy_server_is_asked_again(server, local):
    server.faults = [error(429), error(503)]
    assert asked(server)(["say a"], max_tokens=4) == local(["say a"], max_tokens=4)
    assert len(server.bodies) == 3


def test_pauses_grow_unless_the_server_names_one():
    lost = SimpleNamespace()
    assert [_pause(lost, tried) for tried in range(4)] == [0.5, 1, 2, 4]
    assert _pause(lost, 20) == 60
    limited = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": "7"}))
    assert _pause(limited, 0) == 7


def test_a_server_that_stays_busy_stops_the_run_in_one_line(server, monkeypatch):
    monkeypatch.setenv("KEY_OF_MINE", "sk-secret")
    server.faults = [error(500, "no room for sk-secret")] * 3
    chat = asked(server, retries=2, key_variable="KEY_OF_MINE")
    with pytest.raises(PostgradError) as found:
        chat(["say a"])
    line = str(found.value)
    assert line.startswith(f"tiny at {server.url} did not answer after 2 retries: ")
    assert "no room for ***" in line
    assert "\n" not in line
    assert server.keys == ["Bearer sk-secret"] * 3
    assert "sk-secret" not in line + repr(chat)
    assert chat.counts.given == 0


def test_what_asking_again_cannot_mend_stops_at_once(server):
    server.faults = [error(401, "who are you")]
    with pytest.raises(PostgradError, match=r"who are you.*environment variable OPENAI_API_KEY"):
        asked(server)(["say a"])
    server.faults = [error(400, "too long")]
    with pytest.raises(PostgradError, match=r"did not answer: .*too long"):
        asked(server)(["say a"])
    server.faults = [(200, {"hello": "world"})]
    with pytest.raises(PostgradError, match="no chat completion came back"):
        asked(server)(["say a"])
    assert len(server.bodies) == 3


def test_a_server_that_hangs_or_is_not_there(server):
    server.together = threading.Barrier(2)
    with pytest.raises(PostgradError, match="timed out"):
        asked(server, time_limit=0.1, retries=0)(["say a"])
    server.together.abort()
    with pytest.raises(PostgradError, match="Connection error"):
        ServerChat("tiny", "http://127.0.0.1:9/v1", retries=0)(["say a"])


# What is kept ---------------------------------------------------------------------------------


def test_nothing_is_asked_twice(server):
    chat = asked(server)
    first = chat([*PROMPTS, PROMPTS[0]], n=2, **DRAWN)
    assert first[0] == first[3]
    assert len(server.bodies) == 6
    assert chat(PROMPTS, n=2, **DRAWN) == first[:3]
    assert len(server.bodies) == 6
    assert (chat.counts.wanted, chat.counts.given) == (14, 6)
    chat(PROMPTS, n=2, **DRAWN, seed=1)
    assert len(server.bodies) == 12


def test_a_file_keeps_answers_over_runs_and_outlives_a_kill(server, tmp_path):
    file = tmp_path / "new" / "answers.jsonl"
    first = asked(server, cache=file)(PROMPTS, **DRAWN)
    lines = file.read_text()
    file.write_text(lines[:-5])  # the last line is cut
    assert asked(server, cache=file)(PROMPTS, **DRAWN) == first
    assert len(server.bodies) == 4
    assert asked(server, cache=file)(PROMPTS, **DRAWN) == first
    assert len(server.bodies) == 4
    # another model does not find them
    ServerChat("other", server.url, cache=file)(PROMPTS, **DRAWN)
    assert len(server.bodies) == 7


def test_a_local_model_is_known_by_its_weights(tmp_path):
    file = tmp_path / "answers.jsonl"
    policy = load_policy("tiny")
    LocalChat(policy, cache=file)(PROMPTS, max_tokens=3)
    for model, given in ((load_policy("tiny"), 0), (load_policy("tiny", seed=1), 3)):
        chat = LocalChat(model, cache=file)
        chat(PROMPTS, max_tokens=3)
        assert chat.counts.given == given


# By name --------------------------------------------------------------------------------------


def test_models_by_name(server):
    chat = load_chat(validated(ChatSettings, {"name": "tiny"}))
    assert isinstance(chat, LocalChat)
    remote = load_chat(validated(ChatSettings, {"name": "tiny", "server": server.url}))
    assert remote(["say a"], max_tokens=4) == chat(["say a"], max_tokens=4)


@pytest.mark.parametrize("server", ["localhost:8000", "ftp://host/v1", "http://me:secret@host/v1"])
def test_addresses_that_are_none(server):
    with pytest.raises(PostgradError, match="server: expected an address") as found:
        load_chat(validated(ChatSettings, {"name": "tiny", "server": server}))
    assert "secret" not in str(found.value)
