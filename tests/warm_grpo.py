"""Imported once before processes are forked off: all that a run of GRPO on `tiny` needs is there.

No backward pass is made, as torch does not allow one on both sides of a fork.
"""

import torch
import torch._dynamo  # the optimiser imports it with its first step

from postgrad.api import prepare

torch.set_num_threads(1)

SETTINGS = {
    "model": "tiny",
    "data": {"name": "addition", "settings": {"size": 16}},
    "batch_size": 2,
    "rollout": {"samples": 2, "max_new_tokens": 3},
    "minibatches": 2,
    "eval_size": 2,
    "evaluate_every": 4,
    "steps": 6,
    "save_every": 2,
    "sample_every": 1,
    "learning_rate": 1e-3,
    "threads": 1,
    "log": [],
    "report": False,
}

with torch.no_grad():
    _method, _ = prepare("grpo", **SETTINGS)
    _method.evaluate()
    _method.collect(0)
