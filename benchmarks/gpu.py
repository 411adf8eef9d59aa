"""Updates and sampling on a GPU against the GPU's own limits, by `postgrad bench --device cuda`.

A model of 1.5 billion random weights in the shape of Qwen2.5's; 8 prompts of 128 tokens with 8
completions of 1,024. Utilisation: 6 operations for every token and parameter (a prompt counts once,
the embedding's matrix only at sampled tokens), over the time and the rate of square bf16 products
measured on the same GPU. Bandwidth: the bytes of weights, keys and values that the decoding steps
have to read, over the time and the measured rate of copying.
"""

import json
import subprocess
from typing import Any

from benchmarks.harness import OURS
from benchmarks.rows import Row, Setting

REACH_OF_UPDATE = 0.4
REACH_OF_DECODING = 0.5
QUICK = ["--shape", "tiny", "--prompt-tokens", "8", "--new-tokens", "8"]


def measure(setting: Setting) -> list[Row]:
    command = [OURS, "-m", "postgrad", "bench", "--device", "cuda", "--json"]
    command += ["--repeats", str(setting.repeats), *(QUICK if setting.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return rows_of(json.loads(done.stdout))
    failure = (done.stderr.strip().splitlines() or ["no result"])[-1].removeprefix("error: ")
    return [
        Row("update: utilisation", unit="", reach=REACH_OF_UPDATE, failure=failure),
        Row("decoding: share of bandwidth", unit="", reach=REACH_OF_DECODING, failure=failure),
    ]


def rows_of(speed: dict[str, Any]) -> list[Row]:
    """The rows of what `postgrad bench --json` prints."""
    where = f"{speed['device']}, {speed['precision']}, the shape {speed['shape']}"
    rates = (
        f"products {speed['matrix_rate'] / 1e12:.3g} Tflop/s, "
        f"copying {speed['copy_rate'] / 1e9:,.0f} GB/s"
    )
    return [
        Row(
            "update: utilisation",
            unit="",
            ours=speed["utilisation"],
            reach=REACH_OF_UPDATE,
            memory=speed["peak_bytes"],
            note=f"{where}; {rates}",
        ),
        Row("update: tokens", unit="tokens/s", ours=speed["update_tokens_per_second"]),
        Row(
            "decoding: share of bandwidth",
            unit="",
            ours=speed["bandwidth"],
            reach=REACH_OF_DECODING,
        ),
        Row("decoding: tokens", unit="tokens/s", ours=speed["decoded_tokens_per_second"]),
    ]
