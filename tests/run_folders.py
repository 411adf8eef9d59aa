"""Run folders of made-up numbers, and pages as their reader's browser reads them."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from postgrad.config import LoopSettings

# what a model may write: markup, scripts, what a terminal or rich obeys, a template's language,
# what is not seen or turns the reading direction, half a character, a line without end
HOSTILE_TEXTS = [
    '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & "quoted"',
    "<style>*{display:none}</style><svg onload=alert(3)>",
    "\x1b[31mred\x1b[2J\x1b]0;title\x07\x1b]8;;https://example.org\x1b\\link",
    "\x9b31mred \x90q\x9c",
    "[red]markup[/red] [link=https://example.org]x[/link] [/]",
    "over\rwritten\b\b\x00\x7f",
    "\u202egnitirw\u2066 \u2069\u2028\u2029 \U000e0041",
    "half \ud83d a character",
    "{{ 7 * 7 }} {% for %} ${7 * 7}",
    "long" * 100_000,
]

RUN = {
    "method": "grace",
    "started": "2026-05-04T09:12:44+0200",
    "command": ["/home/ada/bin/postgrad", "train", "grace", "data.columns.anchor=my question"],
    "data": {"data": "sha256:9f2b0c7a"},
    "python": "3.11.9",
    "machine": "x86_64, 2 threads",
    "versions": {"postgrad": "0.1.0", "torch": "2.8.0"},
}
METRICS: list[dict[str, Any]] = [
    {"step": 0, "evaluation/mrr": 0.302, "evaluation/loss": 2.0},
    *(
        {
            "step": step,
            "loss": 1.0 / step,
            "reward": float(step),
            "time/rollout": 3.0,
            "time/update": 5.0,
            "time/step": 10.0,
            "throughput/tokens_per_second": 200.0,
        }
        for step in range(1, 5)
    ),
    {"step": 4, "evaluation/mrr": 0.427, "evaluation/loss": 1.5},
]


class Page(HTMLParser):
    """The elements of a page with their attributes, its visible text, and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._raw: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.text += " " if tag in ("th", "td", "dt", "dd", "tr", "p", "a", "figure") else ""
        self._raw = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw = None

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self.scripts[-1] += data
        elif self._raw is None:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def run_folder(
    path: Path,
    metrics: list[dict[str, Any]] = METRICS,
    samples: list[dict[str, Any]] = [],  # noqa: B006
    run: dict[str, Any] = RUN,
    **config: Any,
) -> Path:
    path.mkdir()
    settings = {
        "method": run["method"],
        "model": "smollm2",
        "data": {"name": "docstrings", "columns": {"anchor": "q"}},
        **LoopSettings(steps=4, learning_rate=3e-4).model_dump(mode="json"),
        **config,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
