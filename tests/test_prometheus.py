"""`log=prometheus`: a run's metrics over HTTP while it goes on, for whom they are meant."""

import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import postgrad
from postgrad.access import listening
from postgrad.errors import PostgradError
from postgrad.training.record import RunFolder

TOKEN = "abcdefgh12345678"


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    with listening("127.0.0.1", 0, "port") as socket:
        return int(socket.getsockname()[1])


def get(port: int, path: str = "/metrics", **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


def samples(text: str) -> dict[tuple[str, str], tuple[dict[str, str], float]]:
    """Values with their labels by name and `metric`, as Prometheus's own parser reads them."""
    return {
        (s.name, s.labels.pop("metric", "")): (dict(s.labels), s.value)
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def config(port: int, **changes: Any) -> dict[str, Any]:
    usual = {
        "prometheus_port": port, "prometheus_host": "127.0.0.1", "prometheus_token_env": None,
    }  # fmt: skip
    return {**usual, **changes}


def test_every_metric_is_a_gauge_while_the_run_goes_on(tmp_path: Path, port: int) -> None:
    labels = {"run": "my run", "method": "grpo"}
    (tmp_path / "my run").mkdir()
    with RunFolder(tmp_path / "my run", trackers=["prometheus"], name="grpo") as folder:
        folder.open(config(port))
        assert samples(get(port)) == {("postgrad_steps_total", ""): (labels, 0.0)}
        folder.metrics(1, {"loss": 0.5, "reward/a b": 1.0, "reward/a_b": 2.0, "kl": float("nan")})
        folder.metrics(2, {"loss": 0.25})
        found = samples(get(port))
    assert found[("postgrad_steps_total", "")] == (labels, 2.0)
    assert found[("postgrad_loss", "loss")] == (labels, 0.25)
    assert found[("postgrad_reward_a_b", "reward/a b")] == (labels, 1.0)
    assert found[("postgrad_reward_a_b", "reward/a_b")] == (labels, 2.0)
    assert found[("postgrad_kl", "kl")][1] != found[("postgrad_kl", "kl")][1]
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(port)


def test_a_resumed_run_counts_on(tmp_path: Path, port: int) -> None:
    with RunFolder(tmp_path, trackers=["prometheus"], name="grpo") as folder:
        folder.open(config(port), 7)
        assert samples(get(port))[("postgrad_steps_total", "")][1] == 7.0


def test_what_names_hold_does_not_break_the_format(tmp_path: Path, port: int) -> None:
    name = 'reward/"x"\\n} 1\nfake_metric 2'
    with RunFolder(tmp_path, trackers=["prometheus"], name="grpo") as folder:
        folder.open(config(port))
        folder.metrics(1, {name: 3.0})
        found = samples(get(port))
    assert {key[0] for key in found} == {
        "postgrad_steps_total", "postgrad_" + re.sub(r"\W", "_", name),
    }  # fmt: skip
    assert [key[1] for key in found if key[1]] == [name]


def test_only_metrics_are_served_and_only_to_this_machine(tmp_path: Path, port: int) -> None:
    with RunFolder(tmp_path, trackers=["prometheus"], name="grpo") as folder:
        folder.open(config(port))
        for path, headers, status in (
            ("/", {}, 404),
            ("/../config.yaml", {}, 404),
            ("/metrics", {"Host": "evil.com"}, 421),
            ("/metrics", {"Sec-Fetch-Site": "cross-site"}, 403),
        ):
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                get(port, path, **headers)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", data=b"x")
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(request, timeout=30)


def test_elsewhere_a_bearer_token_is_demanded(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    settings = config(port, prometheus_host="0.0.0.0", prometheus_token_env="MY_TOKEN")
    with RunFolder(tmp_path, trackers=["prometheus"], name="grpo") as folder:
        folder.open(settings)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(port)
        assert "postgrad_steps_total" in get(port, Authorization=f"Bearer {TOKEN}")


def test_mistakes_are_said_before_the_run_begins(tmp_path: Path, port: int) -> None:
    def refused(why: str, **settings: Any) -> None:
        output = tmp_path / "run"
        with pytest.raises(PostgradError, match=why):
            postgrad.train(
                "sft", model="tiny", steps=1, log=["prometheus"], output=output, **settings
            )
        assert not output.exists()

    refused("0.0.0.0 can be reached by other machines: a token is needed",
            prometheus_host="0.0.0.0", prometheus_port=port)  # fmt: skip
    refused("NO_TOKEN: expected 16 or more", prometheus_token_env="NO_TOKEN", prometheus_port=port)
    refused("prometheus_port: input should be less than or equal to 65535", prometheus_port=70_000)
    with listening("127.0.0.1", port, "port"):
        refused("prometheus_port: cannot listen at 127.0.0.1", prometheus_port=port)


def test_a_training_run_answers(tmp_path: Path, port: int) -> None:
    found: list[str] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        if (tmp_path / "run" / "metrics.jsonl").exists():  # it is tried out before the run begins
            found.append(get(port))
        return [float(len(completion)) for completion in completions]

    postgrad.train(
        "grpo", model="tiny", data={"name": "addition", "settings": {"size": 4}}, reward=reward,
        rollout={"max_new_tokens": 2}, steps=2, batch_size=1, eval_size=1, report=False,
        log=["prometheus"], prometheus_port=port, output=tmp_path / "run",
    )  # fmt: skip
    seen = samples(found[-1])
    # asked from within the last step, or the evaluation after it
    assert seen[("postgrad_steps_total", "")] == ({"run": "run", "method": "grpo"}, 2.0)
    assert ("postgrad_reward", "reward") in seen
