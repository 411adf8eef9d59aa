"""Self-contained pages: templates that escape, styles and scripts inlined, no network."""

import base64
import hashlib
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from postgrad.catalogue import entries
from postgrad.errors import PostgradError
from postgrad.reports.figures import number
from postgrad.visible import visible

_HERE = Path(__file__).parent


def asset(name: str) -> str:
    """The text of a style sheet or script of the reports."""
    return (_HERE / "assets" / name).read_text(encoding="utf-8")


@cache
def templates() -> Environment:
    """The templates of the pages. Everything they show is escaped unless it is markup of ours."""
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    environment.filters["number"] = number
    environment.filters["duration"] = duration
    return environment


def render_page(template: str, *, scripts: tuple[str, ...] = (), **values: Any) -> str:
    """A whole HTML page from a template, with its styles and `scripts` inside.

    The page forbids its reader's browser every request, and every script but these, whatever the
    texts that it shows contain; characters that act instead of being seen are shown as escapes.
    """
    script = "\n".join(asset(name) for name in ("page.js", "figures.js", *scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return rendered(
        template,
        style=asset("figures.css") + asset("page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        **values,
    )


def rendered(template: str, **values: Any) -> str:
    """A template's text with `values` escaped, and odd characters shown as escapes."""
    return visible(templates().get_template(template).render(**values))


def write_page(path: Path, text: str) -> Path:
    """Write a page whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise PostgradError(f"cannot write the report {path}: {error.strerror}") from error
    return path


def paper_facts(slug: str) -> dict[str, str]:
    """A method's slug, title, paper and the paper's address, as far as the catalogue knows them.

    Settings after a colon in the slug belong to the name and to no other fact.
    """
    found = entries().get(slug.partition(":")[0])
    paper = found.paper if found else ""
    arxiv = paper.removeprefix("arXiv:")
    link = f"https://arxiv.org/abs/{arxiv}" if paper.startswith("arXiv:") else ""
    return {
        "method": slug,
        "title": found.title if found else "",
        "paper": paper,
        "link": link,
    }


def plain_json(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return number(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return value


def duration(seconds: float) -> str:
    """`95.2` is `1 min 35 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
