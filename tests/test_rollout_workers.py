"""Settings of workers that cannot be: one line, before a model is loaded or Ray is started.

What workers do is in tests/cluster, on a cluster of two nodes.
"""

import pytest
import ray

from language_runs import SMALL, write_rows
from postgrad.api import prepare
from postgrad.errors import PostgradError

AHEAD = {"stale": 1, "workers": 2}


def refused(tmp_path, slug, **settings):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}] * 8)
    with pytest.raises(PostgradError) as caught:
        prepare(slug, data=data, reward="numeric", **{**SMALL, **settings})
    assert not ray.is_initialized()
    return str(caught.value)


@pytest.mark.parametrize(
    ("slug", "settings", "why"),
    [
        ("dapo", {}, "draws again by what it has drawn first"),
        ("spo-single-stream", {}, "chooses prompts by what it has just learnt"),
        ("pcl", {}, "chooses prompts by what it has just learnt"),
        ("gcpo", {}, "draws more when it has seen the first responses"),
        ("grpo", {"tool": "calculator"}, "has a tool answer between a response's turns"),
        ("rloo", {}, "learns from responses of its present policy"),
        ("ppo-language", {}, "learns from responses of its present policy"),
        ("t-ppo", {}, "learns from responses of its present policy"),
    ],
)
def test_methods_that_cannot_draw_ahead_say_why(tmp_path, slug, settings, why):
    line = refused(tmp_path, slug, rollout=AHEAD, **settings)
    assert line == f"rollout.stale: this method {why}: expected 0, got 1"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"rollout": {"stale": 2}},
            "rollout.stale: workers draw ahead, and rollout.workers is 0; in this process "
            "sync_delay=2 has the same effect",
        ),
        (
            {"rollout": AHEAD, "sync_delay": 1},
            "sync_every, sync_delay: with rollout.stale the weights that draw are older already: "
            "expected 1 and 0",
        ),
        (
            {"rollout": {**AHEAD, "top_p": 0.9}},
            "rollout.top_p: with rollout.stale responses are corrected by the probabilities that "
            "they were sampled with, of all tokens: expected 1, got 0.9",
        ),
        (
            {"rollout": AHEAD, "mask": "gtpo"},
            "sync_every, sync_delay, replay, rollout.stale, carry: the mask of GTPO takes the "
            "policy to be the one that sampled, so expected 1, 0, 0, 0 and 0: no older policy may "
            "sample",
        ),
        (
            {"rollout": {"workers": 1, "engine": "vllm-server"}},
            "rollout.workers: a vLLM server draws by itself: expected 0 with "
            "rollout.engine=vllm-server, got 1",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path, settings, line):
    assert refused(tmp_path, "grpo", **settings) == line
