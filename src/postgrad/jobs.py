"""Independent pieces of work, several at a time, each in a process of one thread."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[..., Result], calls: Mapping[Key, tuple[Any, ...]], jobs: int
) -> Iterator[tuple[Key, Result]]:
    """`work(*call)` of every call, `jobs` of them at a time; results come as they are done.

    What one raises is raised here, once those under way have ended. One thread each makes numbers
    independent of how many are under way. If this process is killed, so are they.
    """
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin) as pool:
        running = {pool.submit(work, *call): key for key, call in calls.items()}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
