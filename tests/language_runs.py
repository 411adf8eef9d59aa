"""What the tests of language methods share: small settings, data files, comparing runs."""

import json

import torch
from safetensors.torch import load_file

from postgrad.api import resume, train
from postgrad.methods.language.comparisons import Compared
from postgrad.training.record import read_rows

SMALL = {
    "model": "tiny",
    "precision": "fp32",
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "report": False,
    "log": [],
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def untimed(run):
    """The rows of a run's metrics without what the clock decides."""
    timed = ("time/", "throughput/")
    rows = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def final_weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same_run(one, other):
    """Both runs have the same metrics and final weights, to the bit."""
    assert untimed(one) == untimed(other)
    first, second = final_weights(one), final_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_resumes(slug, folder, **settings):
    """A run of four steps that was cut after two ends as one that was not, to the bit."""
    train(slug, steps=4, output=folder / "whole", **settings)
    train(slug, steps=2, output=folder / "parts", **settings)
    resume(folder / "parts", steps=4, allow_changes=True)
    assert_same_run(folder / "whole", folder / "parts")


def moved(method, size=0.02):
    """The method after a random change of its policy, so that it differs from its reference."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=random))
    return method


def with_margins(delta):
    """Pairs whose margins are `delta` `[B]`: the chosen response's log-ratio is all of it."""
    logprobs = torch.stack([delta, torch.zeros_like(delta)], 1)
    nothing = torch.zeros_like(logprobs)
    return Compared(
        logprobs, nothing, nothing.long() + 1, nothing, torch.ones_like(nothing).bool(), {}
    )
