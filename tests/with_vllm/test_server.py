"""A vLLM server: weights go to it, it is killed under a run, and the run goes on with another."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from language_runs import SMALL, write_rows
from postgrad.api import resume, train
from postgrad.errors import PostgradError
from postgrad.models.language import load_policy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.sampling.vllm_engine import VLLMServer
from postgrad.training.record import read_rows
from with_vllm.models import long_prompts, write_small_model

TOKEN = "a-token-of-the-tests"
STARTS_WITHIN = 600  # seconds; most of them are imports
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model"))


class Served:
    """vLLM's server as a user starts it, on a free port of this machine."""

    def __init__(self, folder, log):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._folder, self._log = folder, log
        self.start()

    def start(self):
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self._folder,
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
            "--logprobs-mode", "processed_logprobs", "--enforce-eager", "--enable-scale-out",
            "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", "50000000",
        ]  # fmt: skip
        changes = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": TOKEN}
        self._process = subprocess.Popen(
            command, env={**os.environ, **changes}, start_new_session=True,
            stdout=self._log.open("a"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._wait(until_up=True)

    def _wait(self, until_up):
        end = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                up = True
            except (urllib.error.URLError, OSError):
                up = False
            if up == until_up:
                return
            if until_up and self._process.poll() is not None:
                break
            time.sleep(0.2)
        pytest.fail("the server did not start:\n" + self._log.read_text()[-4000:])

    @property
    def group(self):
        """The group of its processes, for a signal to all of them."""
        return self._process.pid

    def gone(self):
        """Wait until it is."""
        self._process.wait()
        self._wait(until_up=False)


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    server = Served(folder, tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    os.killpg(server.group, signal.SIGKILL)
    server.gone()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", TOKEN)


def settings(folder, served, **more):
    rollout = {
        "engine": "vllm-server", "server": served.address, "retries": 1,
        "samples": 4, "max_new_tokens": 6,
    }  # fmt: skip
    return {**SMALL, "model": folder, "rollout": rollout, "batch_size": 2, **more}


def learnt(run):
    return [row for row in read_rows(run / "metrics.jsonl") if "reward" in row]


def test_it_draws_by_the_policys_weights_and_takes_up_new_ones(folder, served, tmp_path):
    policy = load_policy(folder)
    policy.engine = VLLMServer(served.address, str(tmp_path))
    prompts = [policy.render("1+1="), policy.render("22+2=")]
    seen = []
    for temperature in (1.0, 0.6):
        rollouts = generate(
            policy, prompts, SamplingSettings(8, temperature), samples=3, seeds=range(6)
        )
        own = policy.score(rollouts.prompts, rollouts.responses, temperature=temperature).logprobs
        for i, logprobs in enumerate(rollouts.logprobs):
            torch.testing.assert_close(own[i, : len(logprobs)], logprobs, atol=2e-3, rtol=0)
        seen.append(rollouts.texts)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert seen[0] != seen[1]
    policy.engine.close()
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_more_tokens_than_it_takes_at_once(folder, served, tmp_path):
    policy = load_policy(folder)
    policy.engine = VLLMServer(served.address, str(tmp_path))
    prompts = long_prompts(50)  # 4,500 tokens
    rollouts = generate(policy, prompts, SamplingSettings(max_new_tokens=4), seeds=range(50))
    assert len(rollouts.responses) == 50
    policy.engine.close()


def test_a_wrong_token_is_one_line_without_the_token(served, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "another-token")
    with pytest.raises(PostgradError, match="refuses the token") as caught:
        VLLMServer(served.address, "/dev/shm")
    assert "another-token" not in str(caught.value)


def test_a_run_whose_server_is_killed_stops_saved_and_goes_on_with_the_next(
    folder, served, tmp_path
):
    run = tmp_path / "run"
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    reward = tmp_path / "reward.py"
    scored = "def score(completions):\n    return [text.count('1') for text in completions]\n"
    # in the third step, as the machine of the server goes down while a reward is computed
    calls = f"calls = []\nimport os, signal\n{scored}".replace(
        "    return",
        "    calls.append(1)\n"
        "    if len(calls) == 4:  # after a trial and two steps\n"
        f"        os.killpg({served.group}, signal.SIGKILL)\n"
        "    return",
    )
    reward.write_text(calls)
    given = settings(folder, served, data=data, reward=f"{reward}:score", steps=6, output=run)
    with pytest.raises(PostgradError, match="does not answer, tried 2 times") as caught:
        train("grpo", **given)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("step 4: ")
    assert f"--resume {run}" in str(caught.value)
    assert [row["step"] for row in learnt(run)] == [1, 2, 3]
    for path in run.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()

    served.gone()
    served.start()
    reward.write_text(scored)
    finished = resume(run)
    assert finished.finished.step == 6
    rows = learnt(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # the new server began with the folder's weights and was given the run's
    assert max(row["engine/logprob_difference"] for row in rows) < 2e-3
