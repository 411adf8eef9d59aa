"""Responses in several turns with a tool, by the tiny model; and the calculator."""

import ctypes
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.agents.tools import ToolChoice, calculated, made_tool
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.grpo import GRPO
from postgrad.models.language import load_policy
from postgrad.rewards import sandbox
from postgrad.rewards.sandbox import ISOLATIONS
from postgrad.sampling.conversations import converse
from postgrad.sampling.generation import SamplingSettings, generate

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
VOWELS = ("a", "e", "i", "o", "u")


class Counter:
    """Answers every vowel with how many there were so far, and ends the third conversation turn."""

    parallel = 1

    def __init__(self, stop=VOWELS, last=99):
        self.stop, self.last = stop, last
        self.opened, self.closed = [], 0

    def session(self, row):
        self.opened.append(row)
        return Talk(self)


class Talk:
    def __init__(self, tool):
        self.tool, self.heard = tool, []

    def reply(self, turn):
        self.heard.append(turn)
        return None if len(self.heard) >= self.tool.last else f"<{len(self.heard)}>"

    def close(self):
        self.tool.closed += 1


def talk(tool, *, max_turns=4, tokens=24, count=12):
    policy = load_policy("tiny")
    prompts = [policy.render(row["prompt"]) for row in ROWS[:count]]
    settings = SamplingSettings(max_new_tokens=tokens)
    return policy, converse(
        policy, prompts, ROWS[:count], tool, settings, seeds=range(count), max_turns=max_turns
    )


def test_without_a_call_it_is_generation():
    policy, talked = talk(Counter(stop=("@@@@@",)))
    prompts = [policy.render(row["prompt"]) for row in ROWS[:12]]
    drawn = generate(policy, prompts, SamplingSettings(24), seeds=range(12))
    assert talked.texts == drawn.texts
    assert talked.finished.equal(drawn.finished)
    for one, other in zip(talked.logprobs, drawn.logprobs, strict=True):
        assert one.equal(other)
    assert all(bool(written.all()) for written in talked.written)


def test_replies_stand_where_the_turns_end_and_are_not_the_policys():
    tool = Counter()
    policy, talked = talk(tool)
    assert tool.closed == len(tool.opened) == 12
    replies = 0
    for response, written, turns in zip(
        talked.responses, talked.written, talked.turns, strict=True
    ):
        assert len(response) == len(written) == len(turns)
        assert turns.tolist() == sorted(turns.tolist())
        for turn in range(int(turns.max()) + 1):
            here = turns == turn
            own, said = response[here & written], response[here & ~written]
            if len(said):
                replies += 1
                assert policy.decode(said) == f"<{turn + 1}>"
                assert policy.decode(own)[-1] in VOWELS
                # a turn is the policy's tokens and then the reply
                assert not bool(written[here][len(own) :].any())
    assert replies > 10


def test_log_probabilities_are_those_of_the_whole_text_so_far():
    policy, talked = talk(Counter())
    scores = policy.score(talked.prompts, talked.responses)
    for row, logprobs, written in zip(
        scores.logprobs.detach(), talked.logprobs, talked.written, strict=True
    ):
        torch.testing.assert_close(
            row[: len(logprobs)][written], logprobs[written], atol=1e-5, rtol=0
        )
        assert bool((logprobs[~written] == 0).all())


def test_turns_and_tokens_are_limited():
    _, talked = talk(Counter(), max_turns=2, tokens=40)
    assert max(int(turns.max()) for turns in talked.turns) == 1
    assert all(len(response) <= 40 for response in talked.responses)
    called = torch.tensor([not bool(written[-1]) for written in talked.written])
    assert bool(called.any())
    assert not bool(talked.finished[called].any())
    _, short = talk(Counter(), tokens=6)
    assert all(len(response) <= 6 for response in short.responses)


def test_a_tool_can_end_a_response():
    _, talked = talk(Counter(last=1))
    ended = [text[-1] in VOWELS for text in talked.texts if text]
    assert any(ended)
    assert all(bool(done) or text[-1] not in VOWELS
               for done, text in zip(talked.finished, talked.texts, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*3+4", "40"),
        (" 7 - 10", "-3"),
        ("-(2+3)*4", "-20"),
        ("7/2", "3.5"),
        ("8/2", "4"),
        ("007+010", "17"),
        ("1/0", "error"),
        ("2**99999", "error"),
        ("__import__('os')", "error"),
        ("'a'*9", "error"),
        ("1+", "error"),
        ("1+" * 200 + "1", "error"),
        ("(" * 90 + "1" + ")" * 90, "1"),
    ],
)
def test_the_calculator(expression, value):
    assert calculated(expression) == value


def digits(completions):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def made(**config):
    values = {
        "model": "tiny",
        "rollout": {"samples": 8, "max_new_tokens": 64},
        "batch_size": 4,
        "tool": {"name": "calculator", "opening": "a", "closing": "e"},
        **config,
    }
    return GRPO(validated(GRPO.Config, values), Place(), data=ROWS, reward=digits)


def test_any_method_can_call_and_learns_by_its_own_tokens_alone():
    method = made()
    batch = method.collect(0)
    replies = batch.turns.ge(0) & ~batch.mask
    lengths = torch.tensor([len(response) for response in batch.responses])
    replies &= torch.arange(batch.mask.shape[1]) < lengths[:, None]
    assert int(replies.sum()) > 0
    loss, _ = method.loss(batch)
    scores = method._score(batch)
    losses, _ = method.token_losses(batch, scores)
    own = batch.mask.sum(1)
    expected = ((losses * batch.mask).sum(1) / own).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(method.aggregated(losses, batch, scores), scores.logprobs)
    assert bool((gradient[replies] == 0).all())
    shown = method.samples(batch)[0]
    assert len(shown["advantages"]) == len(shown["tokens"])


def test_methods_of_single_turns_refuse_a_tool(tmp_path):
    for slug in ("ghpo", "clpo", "critique-grpo", "hpt"):
        with pytest.raises(PostgradError, match=r"tool: .* one turn: expected none, got 'calcul"):
            train(
                slug, data=ROWS, reward=digits, tool="calculator", steps=1, output=tmp_path, **SMALL
            )


def test_a_run_with_a_tool_resumes(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "grpo", tmp_path, data=data, reward="numeric",
        tool={"name": "calculator", "opening": "a", "closing": "e"}, batch_size=4,
        rollout={"samples": 4, "max_new_tokens": 40}, **SMALL,
    )  # fmt: skip


# The Python interpreter --------------------------------------------------------------------------

ISOLATION = next((name for name in ISOLATIONS if sandbox.why_not(name) is None), None)
needs_sandbox = pytest.mark.skipif(ISOLATION is None, reason="no sandbox here")


def python(**settings):
    return made_tool(ToolChoice(name="python", isolation=ISOLATION, **settings))


@pytest.fixture
def adopts_orphans():
    """Whatever is started below this process stays below it when its parent ends."""
    if sys.platform != "linux":
        pytest.skip("prctl is Linux's")
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


def processes():
    """The processes below this one that have not ended."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True)
    rows = [line.split() for line in found.stdout.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def below(pid):
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return {int(pid) for pid, _, state in rows if state[0] != "Z" and below(int(pid))}


@needs_sandbox
def test_a_conversation_with_python():
    session = python(characters=40).session({})
    assert session.reply("so <python>x = 6\nprint(x)\nx * 7</python>") == "<output>6\n42</output>"
    assert session.reply("<python>\n  x += 1\n  x\n</python>") == "<output>7</output>"
    error = "<output>ZeroDivisionError: division by zero</output>"
    assert session.reply("<python>x / 0</python>") == error
    assert session.reply("<python>print('a'); oops</python>") == (
        "<output>a\nNameError: name 'oops' is not defined</output>"
    )
    assert session.reply("<python>'b' * 99</python>") == "<output>'" + "b" * 39 + "...</output>"
    assert session.reply("x</python>") is None
    session.close()
    session.close()


@needs_sandbox
def test_an_interpreter_that_ended_is_followed_by_a_fresh_one():
    session = python(time_limit=1.0).session({})
    assert session.reply("<python>x = 1</python>") == "<output></output>"
    assert "took too long" in session.reply("<python>while True: pass</python>")
    assert session.reply("<python>x</python>") == "<output>1</output>"
    assert "has ended" in session.reply("<python>import os; os._exit(3)</python>")
    assert "NameError" in session.reply("<python>x</python>")
    session.close()


@needs_sandbox
def test_sessions_start_when_they_are_asked_and_leave_no_process(adopts_orphans):
    before = processes()
    tool = python()
    silent, many = tool.session({}), [tool.session({}) for _ in range(24)]
    with ThreadPoolExecutor(tool.parallel) as pool:
        said = list(pool.map(lambda i: many[i].reply(f"<python>x = {i}; x</python>"), range(24)))
        assert said == [f"<output>{i}</output>" for i in range(24)]
        again = list(pool.map(lambda session: session.reply("<python>x</python>"), many))
    assert again == said
    assert len(processes() - before) > 24
    silent.close()
    for session in many:
        session.close()
    tool.close()
    left = processes() - before
    deadline = time.monotonic() + 20
    while left & processes() and time.monotonic() < deadline:
        pass  # the kernel takes what was told to end
    assert not left & processes()


@needs_sandbox
def test_a_policy_writes_on_after_what_python_printed():
    policy = load_policy("tiny")
    tool = python(opening="a", closing="e", characters=10)
    prompts = [policy.render(row["prompt"]) for row in ROWS]
    talked = converse(
        policy, prompts * 4, ROWS * 4, tool, SamplingSettings(99), seeds=range(96), max_turns=3
    )
    tool.close()
    answered = [text for text in talked.texts if "<output>" in text]
    assert len(answered) > 1
    assert all("a" in text.partition("e<output>")[0] for text in answered)
