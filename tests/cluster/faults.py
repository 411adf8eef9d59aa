"""An engine within a worker that follows orders: files in a folder, each taken by one worker."""

import functools
import os
import signal
from pathlib import Path

from postgrad.errors import PostgradError
from postgrad.sampling.generation import draw_here

REFUSE = "refuse"


def order(folder, what, times=1):
    """Have `times` workers do it when they next draw: "kill", "raise" or "object".

    Or "stay" with a node's id: a worker there says so in the pipe beside the folder, and stays.
    """
    for number in range(times):
        (folder / f"{what}.{number}").touch()


def obedient(folder):
    """What makes the engine of a worker."""
    return functools.partial(_made, str(folder))


def _made(folder, *settings):
    return Obedient(folder)


class Obedient:
    """Draws as the policy does, after what was ordered; no worker starts while one is to refuse."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if (self.folder / REFUSE).exists():
            raise PostgradError("the model's memory is taken")

    def draw(self, policy, wanted):
        for found in sorted(self.folder.glob("*.*")):
            what, *where, _ = found.name.split(".")
            if where not in ([], [_node()]):
                continue
            try:
                found.unlink()
            except FileNotFoundError:  # another worker's
                continue
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stay":
                with (self.folder.parent / "staying").open("w") as pipe:
                    pipe.write("\n")
                signal.pause()
            if what == "raise":
                raise RuntimeError("an illegal memory access\nand a long story about it")
            if what == "object":
                raise PostgradError("the model's memory is taken")
            break
        return draw_here(policy, wanted)


def _node():
    import ray

    return ray.get_runtime_context().get_node_id()
