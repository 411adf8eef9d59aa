"""postgrad: published methods of policy optimisation and contrastive learning, side by side.

`postgrad.train("dpo", model=..., data=...)` and its siblings are the commands as functions;
`postgrad.objectives` and `postgrad.advantages` are the mathematics alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from postgrad.api import resume, train
    from postgrad.claims.run import reproduce
    from postgrad.comparison import compare
    from postgrad.inspection import evaluate, sample

# imported at first use: `import postgrad` itself loads no torch
_HOMES = {
    "train": "postgrad.api",
    "resume": "postgrad.api",
    "reproduce": "postgrad.claims.run",
    "compare": "postgrad.comparison",
    "evaluate": "postgrad.inspection",
    "sample": "postgrad.inspection",
}

__all__ = ["compare", "evaluate", "reproduce", "resume", "sample", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'postgrad' has no attribute {name!r}")
