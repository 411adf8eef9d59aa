"""The documentation: pages that follow from the code, and code in pages that runs."""

import copy
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from postgrad.catalogue import Entry, entries, method_class
from postgrad.config import LoopSettings, dotted_keys
from postgrad.models.embedded import tiny_network, tiny_tokenizer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "_generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate: ModuleType) -> dict[str, str]:
    return dict(generate.generated_files())


def hand_written() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}


def test_the_catalogue_lists_every_method_once(pages: dict[str, str]) -> None:
    page = pages["methods/index.md"]
    published = [entry for entry in entries().values() if entry.status != "baseline"]
    assert f"{len(published)} published methods" in page
    for entry in entries().values():
        rows = re.findall(rf"^\| \[?{re.escape(entry.slug)}[]| ]", page, re.MULTILINE)
        assert len(rows) == 1, entry.slug


def test_every_implemented_method_has_a_page_of_its_facts(pages: dict[str, str]) -> None:
    implemented = [entry for entry in entries().values() if entry.python is not None]
    assert len(implemented) >= 7
    for entry in implemented:
        page = pages[f"methods/{entry.slug}.md"]
        kind = method_class(entry.slug)
        assert page.startswith(f"# {entry.slug}\n")
        tops = {key for key in dotted_keys(kind.Config) if "." not in key}
        assert all(re.search(rf"^\| `{key}[`.]", page, re.MULTILINE) for key in tops)
        assert ("## Four parts" in page) == (kind.four_parts() is not None)
        source = re.findall(r'--8<-- "(.*)"', page)
        assert len(source) == 1
        assert (ROOT / source[0]).is_file()


def test_a_study_has_a_page_of_its_text_and_no_command_to_train_it(pages: dict[str, str]) -> None:
    for slug in ("on-policy-suboptimal", "online-offline-gap"):
        page = pages[f"methods/{slug}.md"]
        assert page.startswith(f"# {slug}\n")
        assert "A study: " in page
        assert f"\npostgrad reproduce {slug}\n" in page
        assert "postgrad train" not in page
        assert "## Settings" not in page
        (source,) = re.findall(r'--8<-- "(.*)"', page)
        assert source == f"src/postgrad/claims/{slug.replace('-', '_')}.py"
        assert (ROOT / source).is_file()
        recorded = entries()[slug].result()
        for finding in recorded["findings"] if recorded else ():
            assert f"<strong>{finding['holds']}</strong>" in page
        row = re.search(rf"^\| \[{slug}\].*$", pages["methods/index.md"], re.MULTILINE)
        assert row is not None
        assert "study" in row[0]


def test_a_page_shows_the_committed_claim_or_that_there_is_none(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {
        "slug": "rdpo", "claim": "it is <better>", "task": "t", "metric": "gap",
        "higher_is_better": False, "seeds": 2, "holds": "yes", "seconds": 1.0, "notes": "a < b",
        "method": {"name": "rDPO", "mean": 0.1, "low": 0.0, "high": 0.2},
        "baseline": {"name": "DPO", "mean": 0.4, "low": 0.3, "high": 0.5},
        "arms": {"rDPO": {"gap": [0.1, 0.1]}, "DPO": {"gap": [0.4, 0.5]}},
        "curves": {"rDPO": [{"gap over size": [[1, 0.2], [2, 0.1]]}] * 2, "DPO": [{}, {}]},
        "versions": {"torch": "2.8.0"},
    }  # fmt: skip
    monkeypatch.setattr(Entry, "result", lambda self: result)
    page = generate.method_page("rdpo")
    assert "The claim holds here." in page
    assert "it is &lt;better&gt;" in page
    assert "a &lt; b" in page
    assert page.count("<svg") == 2
    assert "torch 2.8.0" in page
    monkeypatch.setattr(Entry, "result", lambda self: None)
    assert "Its claim has no committed result yet." in generate.method_page("rdpo")
    assert "the published methods' claims compare with it" in generate.method_page("ppo")


def test_docstrings_become_text_with_their_equations_untouched(generate: ModuleType) -> None:
    doc = "Of a*b* and <c>, but `d*e*`:\n\n    L = a*b*c <d>\n\nEnd."
    assert generate.prose(doc) == (
        r"Of a\*b\* and \<c>, but `d*e*`:" "\n\n    L = a*b*c <d>\n\nEnd."
    )
    assert generate.cell("a | b\n*c*") == r"a \| b \*c\*"


def test_tables_have_the_cells_that_their_heads_announce(
    generate: ModuleType, pages: dict[str, str]
) -> None:
    filled = [make() for make in generate.FILLED.values()]
    for text in [*pages.values(), *filled]:
        for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
            assert len(widths) == 1, table


def test_places_for_generated_tables_are_filled(generate: ModuleType) -> None:
    asked = [
        name for text in hand_written().values() for name in re.findall(r"generated: (\S+) ", text)
    ]
    assert sorted(asked) == sorted(generate.FILLED)
    table = generate.on_page_markdown("<!-- generated: loop-settings -->")
    assert all(f"| `{key}` |" in table for key in LoopSettings.model_fields)
    commands = generate.on_page_markdown("<!-- generated: commands -->")
    assert "## postgrad reproduce" in commands
    assert "--seeds" in commands


def test_links_between_pages_lead_somewhere(pages: dict[str, str]) -> None:
    written = hand_written()
    known = written.keys() | pages.keys()
    for name, text in {**written, **pages}.items():
        if not name.endswith(".md"):
            continue
        for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", text):
            path = (Path(name).parent / target).as_posix()
            path = path.removeprefix("methods/../")
            assert path in known, f"{name} links to {target}"


def test_the_navigation_names_every_page(generate: ModuleType, pages: dict[str, str]) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    generate.on_config(config)

    def leaves(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [
            leaf
            for inner in (part.values() if isinstance(part, dict) else part)
            for leaf in leaves(inner)
        ]

    expected = {name for name in (*hand_written(), *pages) if name.endswith(".md")}
    assert sorted(leaves(config["nav"])) == sorted(expected)


def plain_loop(steps: int = 2) -> dict[str, Any]:
    """What the example of a plain loop finds: a network, its reference, batches of two pairs."""
    network = tiny_network(tiny_tokenizer(), seed=0)
    ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    response = torch.arange(9)[None, :] >= torch.tensor([4, 4, 4, 4])[:, None]
    return {
        "network": network,
        "reference": copy.deepcopy(network),
        "batches": [(ids, attention, response)] * steps,
    }


def test_the_plain_loop_learns_the_pairs_of_its_batches() -> None:
    text = (DOCS / "objectives.md").read_text(encoding="utf-8")
    (block,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "in batches" in block
    ]
    values = plain_loop(steps=1)
    exec(block, values)
    # at the reference: log 2, and the mean log-probability of a token of the chosen responses
    first = values["loss"].item()
    nll = -values["won"].mean().item() / 5
    assert first == pytest.approx(math.log(2) + 0.2 * nll, abs=1e-5)
    values = plain_loop(steps=20)
    exec(block, values)
    assert values["loss"].item() < first - 0.3
    assert (values["h"] > 0).all()


@pytest.mark.parametrize("page", ["docs/objectives.md", "README.md"])
def test_the_examples_of_mathematics_run_as_they_stand(page: str) -> None:
    torch.manual_seed(0)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "objectives" in block and "from trl" not in block
    ]
    assert blocks
    policy = (-torch.rand(4, 6)).requires_grad_()
    values: dict[str, Any] = {
        "rewards": torch.tensor([0.0, 1.0, 1.0, 0.0]),
        "groups": torch.tensor([0, 0, 1, 1]),
        "logprobs": policy,
        "old_logprobs": policy.detach() - 0.01,
        "mask": torch.ones(4, 6, dtype=torch.bool),
        "chosen_logprobs": policy,
        "chosen_mask": torch.ones(4, 6, dtype=torch.bool),
        "rejected_logprobs": -torch.rand(4, 6),
        "rejected_mask": torch.ones(4, 6, dtype=torch.bool),
        "reference_chosen": -torch.rand(4),
        "reference_rejected": -torch.rand(4),
        **plain_loop(),
    }
    for block in blocks:
        exec(block, values)
        assert torch.isfinite(values["loss"]).all()
    assert policy.grad is not None
    assert policy.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_a_request(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "site" / "methods" / "rdpo.html").read_text(encoding="utf-8")
    assert "RobustDPO" in re.sub(r"<[^>]*>", "", page.partition('id="source"')[2])
    loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="([^"]+)"', page)
    assert loaded
    assert not [address for address in loaded if re.match(r"(https?:)?//", address)]
