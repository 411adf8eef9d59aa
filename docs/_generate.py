"""MkDocs hook: pages and tables that follow from the code, so that nothing is written twice.

- `methods/`: the catalogue, and a page for each implemented method and each study, from its entry,
  docstring, settings, four parts and committed claim;
- `reference/`: a page for each room of the package (mkdocstrings reads the docstrings);
- root files (ARCHITECTURE.md …) as pages, and `<!-- generated: NAME -->` in hand-written pages.
"""

import html
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import jinja2

from postgrad.catalogue import Entry, entries, method_class
from postgrad.cli import main
from postgrad.config import LoopSettings
from postgrad.evaluation.statistics import mean_interval
from postgrad.methods.language.parts.choices import (
    AdvantageChoice,
    DenominatorChoice,
    GradientChoice,
    MaskChoice,
)
from postgrad.reports.claim import claim_parts
from postgrad.reports.intervals import BAND_NOTE, INTERVAL_NOTE
from postgrad.reports.method import SettingFact, method_facts, setting_facts
from postgrad.reports.page import asset, paper_facts
from postgrad.rewards.verifiers import VERIFIERS
from postgrad.tasks.formats import REQUIRED, SYNONYMS

ROOT = Path(__file__).parent.parent
ROOMS = (
    "objectives", "advantages", "tasks", "models", "sampling", "rewards", "evaluation", "methods",
    "training", "claims", "reports",
)  # fmt: skip
GROUND_FLOOR = (
    "api", "compare", "inspection", "config", "batch", "catalogue", "errors", "seeding", "visible",
    "access",
)  # fmt: skip
# a root file becomes a page; links between root files follow
ROOT_PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "_templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation."""
    sections = {name: section for part in config["nav"] for name, section in _named(part)}
    sections["Methods"] += _method_navigation()
    sections["Reference"] += [f"reference/{name}.md" for name in ("index", *ROOMS)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the figures' style and script."""
    from mkdocs.structure.files import File

    for path, text in generated_files().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places that hand-written pages leave for tables from the code."""
    return re.sub(r"<!-- generated: (\S+) -->", lambda found: FILLED[found[1]](), markdown)


def generated_files() -> dict[str, str]:
    """Every generated file's text by its path in the documentation."""
    pages = {"methods/index.md": catalogue_page()}
    for entry in documented():
        pages[f"methods/{entry.slug}.md"] = method_page(entry.slug)
    pages["reference/index.md"] = _reference("postgrad", "Commands and ground floor", GROUND_FLOOR)
    for room in ROOMS:
        modules = _modules(f"postgrad.{room}")
        pages[f"reference/{room}.md"] = _reference(f"postgrad.{room}", f"`{room}`", modules)
    for source, page in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        pages[page] = re.sub(
            r"\]\((\w+\.md)\)", lambda link: f"]({ROOT_PAGES.get(link[1], link[1])})", text
        )
    return pages | {f"assets/figures.{kind}": asset(f"figures.{kind}") for kind in ("css", "js")}


def documented() -> list[Entry]:
    """The entries that have a page: what is implemented, and studies that can be run."""
    return [
        entry
        for entry in entries().values()
        if entry.python is not None or (entry.study and entry.claim_file.is_file())
    ]


def method_page(slug: str) -> str:
    """The page of an implemented method or of a study."""
    facts = method_facts(slug)
    module = str(facts.entry.python).partition(":")[0]
    if facts.entry.study:
        module = f"postgrad.claims.{facts.entry.claim_file.stem}"
    recipe = [fact for fact in facts.loop if fact.source == "this method's recipe"]
    text = TEMPLATES.get_template("method.md").render(
        facts=facts,
        entry=facts.entry,
        link=paper_facts(slug)["link"],
        status=_status(facts.entry),
        description=prose(facts.description),
        prose=prose,
        cell=cell,
        settings=settings_table(facts.settings) if facts.settings else "",
        recipe=settings_table(recipe, with_source=False) if recipe else "",
        claim=claim_parts(facts.result) if facts.result else None,
        band_note=BAND_NOTE,
        interval_note=INTERVAL_NOTE,
        source=f"src/{module.replace('.', '/')}.py",
        reproducible=facts.entry.claim_file.is_file(),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def catalogue_page() -> str:
    """All entries by family, with their status."""
    families: dict[str, list[Entry]] = {}
    for entry in entries().values():
        family = "baselines" if entry.status == "baseline" else entry.family
        families.setdefault(family, []).append(entry)
    families["baselines"] = families.pop("baselines")
    published = [entry for entry in entries().values() if entry.status != "baseline"]
    paged = {entry.slug for entry in documented()}
    return TEMPLATES.get_template("catalogue.md").render(
        families=families,
        published=len(published),
        ready=sum(entry.status == "ready" for entry in published),
        trains=sum(entry.status == "trains" for entry in published),
        paged=paged,
        links={entry.slug: paper_facts(entry.slug)["link"] for entry in entries().values()},
        status=_status,
        verdicts={slug: _verdict(entries()[slug]) for slug in paged},
        cell=cell,
    )


def settings_table(facts: Iterable[SettingFact], *, with_source: bool = True) -> str:
    """Settings as a Markdown table."""
    heads = ["Key", "Default", "Values", "Meaning"] + (["Source of the default"] * with_source)
    rows = [
        [f"`{fact.key}`", _code(fact.default), cell(fact.values), cell(fact.meaning)]
        + ([cell(fact.source)] if with_source else [])
        for fact in facts
    ]
    return _table(heads, rows)


def prose(docstring: str) -> str:
    """A docstring as Markdown: its indented equations as they are, nothing else as markup."""
    lines = []
    for line in docstring.splitlines():
        parts = re.split(r"(`[^`]*`)", line)
        quoted = [
            part if part.startswith("`") else re.sub(r"([*<\\])", r"\\\1", part) for part in parts
        ]
        lines.append(line if line.startswith("    ") else "".join(quoted))
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return re.sub(r"([*<\\|])", r"\\\1", " ".join(text.split()))


def formats_table() -> str:
    """The data formats with the columns that each needs."""
    rows = []
    for format, columns in REQUIRED.items():
        also = "; ".join(
            f"`{ours}`: " + ", ".join(f"`{name}`" for name in theirs)
            for ours, theirs in SYNONYMS.get(format, {}).items()
        )
        rows.append([f"`{format}`", ", ".join(f"`{column}`" for column in columns), also])
    return _table(["Format", "Columns", "Also accepted"], rows)


def verifiers_table() -> str:
    """The rewards that the library brings, with their settings."""
    rows = []
    for name, maker in VERIFIERS.items():
        summary = (inspect.getdoc(maker) or "").split("\n\n")[0]
        settings = [
            str(parameter).partition(":")[0]
            + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")
            for parameter in inspect.signature(maker).parameters.values()
        ]
        rows.append([f"`{name}`", cell(summary), ", ".join(map(_code, settings))])
    return _table(["Name", "Reward", "Settings"], rows)


def loop_settings_table() -> str:
    """The settings of the training loop."""
    return settings_table(setting_facts(LoopSettings), with_source=False)


def commands_help() -> str:
    """What every command's `--help` prints."""
    parts = []
    with click.Context(main, info_name="postgrad") as parent:
        for name, command in main.commands.items():
            with click.Context(command, info_name=name, parent=parent) as context:
                parts.append(f"## postgrad {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


_SPELLED = {"dpo": "DPO", "gpu": "GPU", "grpo": "GRPO", "sft": "SFT", "vllm": "vLLM"}


def benchmarks_tables() -> str:
    """The committed benchmark results: what each measures, and its rows on every machine."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((ROOT / "benchmarks/results").glob("*/*.json")):
        found.setdefault(file.stem, []).append(json.loads(file.read_text(encoding="utf-8")))
    parts = []
    for name, results in sorted(found.items()):
        words = [_SPELLED.get(word, word) for word in name.split("_")]
        parts += [f"### {words[0][0].upper()}{' '.join(words)[1:]}", results[0]["what"]]
        for result in results:
            rows = [_benchmark_row(row) for row in result["rows"]]
            heads = ["Row", "Ours", "Peer's", "Times better", "Reach"]
            heads += ["Memory", "Peer's", "Times less"]
            notes = [f"- {row['name']}: {row['note']}" for row in result["rows"] if row["note"]]
            parts += [
                f"**{result['machine']['processor']}**",
                _table(heads, rows),
                "\n".join(notes),
                f"Measured {result['date'][:10]} by `benchmarks/{name}.py`: "
                + _machine(result["machine"]),
            ]
    return "\n\n".join(part for part in parts if part)


def _benchmark_row(row: dict[str, Any]) -> list[str]:
    def quantity(value: float | None, unit: str) -> str:
        return (
            "–"
            if value is None
            else f"{value:,.3g} {unit}"
            if value < 1000
            else f"{value:,.0f} {unit}"
        )

    def reach(value: float | None, reached: bool | None, sign: str) -> str:
        if value is None:
            return ""
        return f"{sign}{value:g} " + {True: "✓", False: "✗ not reached", None: ""}[reached]

    def times(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.3g}" + (" (peer wins)" if ratio < 1 else "")

    def gigabytes(size: int | None) -> str:
        return "" if size is None else f"{size / 1e9:.2f} GB"

    theirs = f"{quantity(row['theirs'], row['unit'])} ({row['peer']})" if row["peer"] else ""
    failure = f" (could not run: {cell(row['failure'].splitlines()[-1])})" if row["failure"] else ""
    return [
        row["name"] + failure,
        quantity(row["ours"], row["unit"]),
        theirs,
        times(row["ratio"]),
        reach(row["reach"], row["reached"], "at most " if row["at_most"] else "at least "),
        gigabytes(row["memory"]),
        gigabytes(row["peer_memory"]),
        f"{times(row['memory_ratio'])} {reach(row['memory_reach'], row['memory_reached'], 'of ')}",
    ]


def _machine(machine: dict[str, Any]) -> str:
    versions = {**machine["versions"]["ours"], **machine["versions"]["peers"]}
    known = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"{machine['processor']}, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; square products "
        f"{machine['fp32_operations_per_second'] / 1e9:.0f} Gflop/s in fp32 and "
        f"{machine['bf16_operations_per_second'] / 1e9:.0f} in bf16 (`torch.mm`), copying "
        f"{machine['copy_bytes_per_second'] / 1e9:.0f} GB/s; {known}."
    )


def parts_tables() -> str:
    """Every part of the policy-gradient estimator by its name, with its settings."""
    blocks = []
    for choice in (MaskChoice, DenominatorChoice, AdvantageChoice, GradientChoice):
        rows = []
        for name in choice.implementations:
            part = choice.implementation(name)
            settings = (f"{fact.key} = {fact.default}" for fact in setting_facts(part.Config))
            summary = (inspect.getdoc(part) or "").splitlines()[0]
            rows.append([f"`{name}`", cell(summary), ", ".join(map(_code, settings))])
        blocks.append(_table([f"`{choice.kind}=`", "What it is", "Its settings"], rows))
    return "\n\n".join(blocks)


def four_parts_table() -> str:
    """The policy-gradient methods by their four parts."""
    rows = []
    for entry in documented():
        parts = None if entry.python is None else method_class(entry.slug).four_parts()
        if parts is not None:
            rows.append(
                [f"[{entry.slug}](methods/{entry.slug}.md)", *map(cell, asdict(parts).values())]
            )
    return _table(["Method", "Mask", "Denominator", "Advantage", "Likelihood gradient"], rows)


def study_table() -> str:
    """The committed study of all methods on verifiable rewards, the most accurate first."""
    study = json.loads((ROOT / "recipes/results/study_verifiable.json").read_text(encoding="utf-8"))
    methods: dict[str, dict[str, dict[str, list[float]]]] = study["methods"]
    tasks = list(next(iter(methods.values())))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def interval(values: list[float]) -> str:
        found = mean_interval(values)
        return f"{found.mean:.2f} [{max(0.0, found.low):.2f}, {min(1.0, found.high):.2f}]"

    def overall(slug: str, name: str) -> str:
        known = [methods[slug][task][name] for task in tasks if name in methods[slug][task]]
        return f"{mean([mean(values) for values in known]):.2f}" if known else ""

    order = sorted(
        methods, key=lambda slug: -mean([mean(methods[slug][t]["after"]) for t in tasks])
    )
    start = [f"{mean(next(iter(methods.values()))[task]['before']):.2f}" for task in tasks]
    rows = [["*before*", *start, "", ""]]
    for slug in order:
        after = [interval(methods[slug][task]["after"]) for task in tasks]
        others = [overall(slug, name) for name in ("silent groups", "entropy")]
        rows.append([f"[{slug}](methods/{slug}.md)", *after, *others])
    heads = ["Method", *(task.replace("_", " ") for task in tasks), "Silent groups", "Entropy"]
    note = f"{study['budget']} samples a run, {study['seeds']} seeds, {study['date']}."
    return f"{_table(heads, rows)}\n\n{note}"


FILLED: dict[str, Callable[[], str]] = {
    "formats": formats_table,
    "verifiers": verifiers_table,
    "loop-settings": loop_settings_table,
    "commands": commands_help,
    "benchmarks": benchmarks_tables,
    "parts": parts_tables,
    "four-parts": four_parts_table,
    "study-verifiable": study_table,
}


def _named(part: Any) -> Iterable[tuple[str, Any]]:
    return part.items() if isinstance(part, dict) else ()


def _method_navigation() -> list[Any]:
    families: dict[str, list[Any]] = {}
    for entry in documented():
        family = "baselines" if entry.status == "baseline" else entry.family
        families.setdefault(family, []).append({entry.slug: f"methods/{entry.slug}.md"})
    return ["methods/index.md", *({family: pages} for family, pages in families.items())]


def _status(entry: Entry) -> str:
    if entry.study:
        return "study, ready" if entry.status == "ready" else "study, its result not committed yet"
    return "trains; its claim has not been run" if entry.status == "trains" else entry.status


def _verdict(entry: Entry) -> str:
    result = entry.result()
    return "" if result is None else str(result["holds"])


def _modules(package: str) -> list[str]:
    """The dotted names of a package's modules, relative to it."""
    folder = ROOT / "src" / package.replace(".", "/")
    found = pkgutil.walk_packages([str(folder)])
    return sorted(module.name for module in found if not module.ispkg)


def _reference(package: str, title: str, modules: Iterable[str]) -> str:
    blocks = [f"::: {package}.{name}\n" for name in modules]
    return f"# {title}\n\n" + "\n".join(blocks)


def _code(text: str) -> str:
    if "|" in text:  # which would end a table's cell
        return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"
    return f"`{text}`" if text else ""


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
