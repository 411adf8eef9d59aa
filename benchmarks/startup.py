"""How long it takes to start: `import postgrad`, and `postgrad list`, as whole processes.

The import counts beyond a bare `python -c pass`, the list in full. Medians; the processes take
turns.
"""

import subprocess
import time
from statistics import median

from benchmarks.harness import OURS
from benchmarks.rows import Row, Setting

PROCESSES = {
    "bare": ["-c", "pass"],
    "import": ["-c", "import postgrad"],
    "list": ["-m", "postgrad", "list"],
}
REACH_OF_IMPORT = 0.1  # seconds
REACH_OF_LIST = 0.3


def measure(setting: Setting) -> list[Row]:
    taken: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for turn in range(setting.repeats + 1):
        for name, arguments in PROCESSES.items():
            seconds = _seconds([OURS, *arguments])
            if turn > 0:  # the first finds the files not yet in memory
                taken[name].append(seconds)
    bare, imported, listed = (median(taken[name]) for name in PROCESSES)
    return [
        Row(
            "import postgrad, beyond a bare Python",
            ours=imported - bare,
            reach=REACH_OF_IMPORT,
            at_most=True,
            note=f"a bare Python takes {bare:.3f} s",
            turns={"bare": taken["bare"], "ours": taken["import"]},
        ),
        Row(
            "postgrad list",
            ours=listed,
            reach=REACH_OF_LIST,
            at_most=True,
            turns={"ours": taken["list"]},
        ),
    ]


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started
