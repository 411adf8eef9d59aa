"""The command line: parses, calls, prints. Everything heavy is imported inside its command."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from postgrad import __version__
from postgrad.catalogue import entries, require_implemented
from postgrad.errors import PostgradError
from postgrad.visible import shortened, visible

_LONGEST_ERROR = 1500  # characters: a wrong value may be as long as a book


class Commands(click.Group):
    """Turns a user's mistake into one line and exit code 2; --debug shows the traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.NoSuchOption as error:
            if error.ctx and _takes_settings(error.ctx.command):
                key = error.option_name.lstrip("-").replace("-", "_")
                line = f"{error.format_message()} Settings are given without dashes: {key}=VALUE"
                raise click.UsageError(line, error.ctx) from error
            raise
        except PostgradError as error:
            if context.params.get("debug"):
                raise
            if _speaks():
                from postgrad.secrecy import blanked

                line = " ".join(str(error).split())  # names of files and keys may hold line breaks
                line = shortened(visible(blanked(line)), _LONGEST_ERROR)
                click.echo(f"error: {line}", err=True)
            context.exit(2)


def _takes_settings(command: click.Command) -> bool:
    return any("KEY=VALUE" in p.make_metavar(click.Context(command)) for p in command.params)


def _speaks() -> bool:
    """Whether this process tells people what happens: of several that were launched the first."""
    return os.environ.get("RANK", "0") == "0"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="postgrad")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Published methods of policy optimisation and contrastive learning, side by side."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # what a terminal or file cannot hold of a model's words is written as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        # transformers' bars redraw themselves, which fills a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _complete_method(context: click.Context, argument: click.Parameter, typed: str) -> list[str]:
    return [slug for slug in entries() if slug.startswith(typed)]


_method = click.argument("method", shell_complete=_complete_method)


@main.command("list")
@click.option("--family", help="Only this family, e.g. control or language/preference.")
@click.option("--ready", is_flag=True, help="Only what can be run now, baselines included.")
@click.option("--json", "as_json", is_flag=True, help="An array of objects.")
def list_methods(family: str | None, ready: bool, as_json: bool) -> None:
    """List the methods and their status."""
    families = {entry.family for entry in entries().values()}
    if family and not any(name == family or name.startswith(family + "/") for name in families):
        from postgrad.errors import unknown

        raise unknown("family", family, families)
    chosen = [
        entry
        for entry in entries().values()
        if (not family or f"{entry.family}/".startswith(f"{family}/"))
        and (not ready or entry.status != "planned")
    ]
    if as_json:
        names = ("slug", "title", "paper", "year", "family", "kind", "needs", "status", "study")
        rows = [{name: getattr(entry, name) for name in names} for entry in chosen]
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    width = max((len(entry.slug) for entry in chosen), default=0)
    last = None
    for entry in sorted(chosen, key=lambda e: (e.status == "baseline", e.family)):
        group = "baselines" if entry.status == "baseline" else entry.family
        if group != last:
            click.echo(("" if last is None else "\n") + click.style(group, bold=True))
            last = group
        status = "" if entry.status == "baseline" else entry.status
        title = entry.title if len(entry.title) <= 84 else entry.title[:83] + "…"
        click.echo(f"  {entry.slug:{width}}  {status:8} {title}")


@main.command()
@_method
def show(method: str) -> None:
    """What a method is: equation, parts, data it needs, settings with sources, claim."""
    from postgrad.reports.method import method_text

    click.echo(method_text(method))


@main.command()
@click.argument("method", required=False, shell_complete=_complete_method)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", type=click.Path(), help="A YAML file of settings.")
@click.option("--model", help="Model: embedded name, local folder or Hub id.")
@click.option("--data", help="Data: embedded task, local file or Hub id.")
@click.option("--resume", "run", type=click.Path(), help="Continue this run folder.")
@click.option(
    "--allow-changes", is_flag=True, help="With --resume: accept a changed configuration."
)
def train(
    method: str | None,
    settings: tuple[str, ...],
    config: str | None,
    model: str | None,
    data: str | None,
    run: str | None,
    allow_changes: bool,
) -> None:
    """Train METHOD; its settings as KEY=VALUE (see `postgrad show METHOD`)."""
    from postgrad.config import merge, parse_overrides, read_yaml

    words = list(settings)
    if method is not None and "=" in method:
        words, method = [method, *words], None
    values = parse_overrides(words)
    for name, value in (("model", model), ("data", data)):
        if value is not None:
            values = merge(values, {name: value})
    if run is None and method is None and config is not None:
        method = read_yaml(config).get("method")
    if run is None and method is None:
        raise PostgradError("which method? `postgrad train METHOD`, or --config, or --resume RUN")
    if run is None and method is not None:
        require_implemented(method)
    from postgrad import api, processes

    base = read_yaml(config) if config else {}
    if not processes.launched():
        from postgrad.launch import launch, layout
        from postgrad.training.record import read_config

        saved = {} if run is None else read_config(Path(run))
        wanted = layout({**saved, **base, **values})
        if wanted.several:
            sys.exit(launch(wanted, sys.argv[1:]))
    if run is not None:
        if method not in (None, base.pop("method", method)):
            raise PostgradError(f"method: the configuration is not for {method!r}")
        done = api.resume(run, allow_changes=allow_changes, quiet=False, **merge(base, values))
    else:
        done = api.train(str(method), config=config, quiet=False, **values)
    if not _speaks():
        return
    if done.finished.interrupted:
        click.echo(
            f"stopped after step {done.finished.step}; continue with\n"
            f"  postgrad train --resume {done.folder}"
        )
        sys.exit(130)
    for name, number in done.evaluation.items():
        click.echo(f"{name}: {number:.4g}")
    report = done.folder / "report.html"
    click.echo(f"run folder: {done.folder}" + (f"\nreport: {report}" if report.exists() else ""))


@main.command()
@_method
@click.option("--quick", is_flag=True, help="The same code in seconds; decides nothing.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option("--json", "as_json", is_flag=True, help="Print the result object only.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--jobs", type=click.IntRange(1, 512), help="Runs at once (default: one a core).")
@click.option("--record", is_flag=True, help="Also commit the result to the package's own records.")
def reproduce(
    method: str,
    quick: bool,
    seeds: int,
    as_json: bool,
    output: Path | None,
    jobs: int | None,
    record: bool,
) -> None:
    """Rerun METHOD's claim: its paper's comparison in miniature, with intervals over seeds."""
    from postgrad.catalogue import entry

    known = entry(method)
    if not known.study:
        require_implemented(method)
    from postgrad.claims.run import reproduce as run_claim
    from postgrad.claims.run import save_result
    from postgrad.reports.claim import write_claim_report

    if record and quick:
        raise PostgradError("--record: a quick run decides nothing and is not recorded")
    output = output or Path("runs/reproduce") / (f"{method}-quick" if quick else method)
    result = run_claim(
        method,
        seeds=seeds,
        quick=quick,
        output=output,
        jobs=jobs,
        say=lambda line: click.echo(line, err=True),
    )
    report = write_claim_report(result, output / "report.html")
    if record:
        save_result(result, known.result_file)
    if as_json:
        shown = ("slug", "claim", "metric", "method", "baseline", "seeds", "holds", "findings")
        click.echo(json.dumps({name: result[name] for name in (*shown, "seconds")}, indent=1))
        return
    click.echo(f"{result['claim']}\n{result['metric']}, {seeds} seeds, 95 % intervals:")
    for side in (result["method"], result["baseline"]):
        click.echo(
            f"  {side['name']:24} {side['mean']:.4g}  [{side['low']:.4g}, {side['high']:.4g}]"
        )
    click.echo(f"holds: {result['holds']}")
    for finding in result["findings"]:
        click.echo(f"  {finding['holds']}: {finding['statement']} ({finding['metric']})")
    click.echo(f"report: {report}")


@main.command()
@click.argument(
    "words", nargs=-1, required=True, metavar="METHOD... [KEY=VALUE]...",
    shell_complete=_complete_method,
)  # fmt: skip
@click.option("--model", help="Model: embedded name, local folder or Hub id.")
@click.option("--data", required=True, help="Data that all methods share.")
@click.option("--budget", required=True, type=click.IntRange(1), help="Samples each may use.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1, 100))
@click.option("--output", type=click.Path(path_type=Path), help="Folder of runs and page.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs at once.")
def compare(
    words: tuple[str, ...],
    model: str | None,
    data: str,
    budget: int,
    seeds: int,
    output: Path | None,
    jobs: int,
) -> None:
    """Train several METHODs on the same data, samples and seeds; a table and a page.

    Settings, as KEY=VALUE, are those of every method that has them;
    METHOD:KEY=VALUE,KEY=VALUE has its own, and a method may so be compared
    with itself.
    """
    # METHOD, METHOD:KEY=VALUE,… or KEY=VALUE
    methods = [word for word in words if ":" in word.partition("=")[0] or "=" not in word]
    if not methods:
        raise PostgradError("which methods? `postgrad compare METHOD METHOD … --data …`")
    for method in methods:
        require_implemented(method.partition(":")[0])
    from postgrad.comparison import compare as run_comparison
    from postgrad.config import merge, parse_overrides

    settings = parse_overrides([word for word in words if word not in methods])
    values = merge({"data": {"name": data}}, settings)
    if model is not None:
        values = merge(values, {"model": model})
    table, page = run_comparison(
        methods,
        budget=budget,
        seeds=seeds,
        output=output,
        jobs=jobs,
        say=lambda line: click.echo(line, err=True),
        **values,
    )
    click.echo(f"{table}\npage: {page}")


@main.command()
@click.argument("run_or_model")
@click.option("--task", help="Task or data to evaluate on; a run's own held-out data when empty.")
@click.option("--limit", default=128, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True)
def evaluate(run_or_model: str, task: str | None, limit: int, as_json: bool) -> None:
    """Metrics of a run or a model on held-out data."""
    from postgrad.inspection import evaluate as evaluate_it

    metrics = evaluate_it(run_or_model, task, limit)
    if as_json:
        click.echo(json.dumps(metrics, indent=1))
        return
    for name, value in metrics.items():
        click.echo(f"{name}: {value:.4g}")


@main.command()
@click.argument("run")
@click.argument("prompt")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def sample(run: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Let a run's (or any) language model answer PROMPT."""
    from postgrad.inspection import sample as sample_it

    text = sample_it(run, prompt, max_new_tokens, temperature, seed)
    # files and pipes get what the model wrote; a terminal would obey some of it
    click.echo(visible(text) if sys.stdout.isatty() else text)


@main.command()
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Where to write the .npy file.")
def embed(run: str, file: Path, output: Path | None) -> None:
    """Embed the lines of FILE (or the `text` of its JSON Lines) with a run's model."""
    from postgrad.inspection import embed_file

    target, shape = embed_file(run, file, output)
    click.echo(f"{shape[0]} embeddings of {shape[1]} dimensions: {target}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--metrics", help="Names or patterns, with commas: reward,evaluation/*.")
@click.option("--once", is_flag=True, help="Print what there is now, and end.")
@click.option(
    "--every", default=2.0, show_default=True, type=click.FloatRange(0.1), help="Seconds."
)
@click.option("--wait", type=click.FloatRange(0), help="Seconds to wait for a run to begin.")
def watch(
    runs: tuple[Path, ...], metrics: str | None, once: bool, every: float, wait: float | None
) -> None:
    """Curves and newest samples of RUNS, in the terminal, until they end."""
    from postgrad.reports.terminal import watch as watch_them

    names = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    try:
        watch_them(runs, metrics=names, once=once, every=every, patience=wait)
    except KeyboardInterrupt:  # the ordinary end of watching
        sys.exit(0)


@main.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=8420, show_default=True, type=click.IntRange(0, 65535))
@click.option("--token-env", metavar="NAME", help="Environment variable that holds the token.")
def serve(folders: tuple[Path, ...], host: str, port: int, token_env: str | None) -> None:
    """Runs below FOLDERs (default: runs) in the browser: curves, samples; read-only.

    Only this machine can reach it; with another --host a token is demanded, which is
    made up and printed unless --token-env names one.
    """
    from postgrad.reports.serve import serve as serve_them

    try:
        serve_them(
            folders or (Path("runs"),), host=host, port=port, token_env=token_env, say=click.echo
        )
    except KeyboardInterrupt:  # the ordinary end of serving
        sys.exit(0)


@main.command()
def doctor() -> None:
    """What is installed, what hardware is used, what is missing and how to get it."""
    from postgrad.doctor import report

    click.echo(report())


@main.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
@click.option("--shape", help="tiny, 135m or 1.5b; by the device when empty.")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1))
@click.option("--completions", default=8, show_default=True, type=click.IntRange(2))
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--new-tokens", type=click.IntRange(1), help="By the device when empty.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True)
def bench(as_json: bool, **settings: Any) -> None:
    """How fast updates and sampling are here, and how close to the machine's own limits."""
    from postgrad.speed import measure, report

    speed = measure(**settings)
    click.echo(json.dumps(speed.as_dict(), indent=1) if as_json else report(speed))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: `eval "$(postgrad completion bash)"`."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise PostgradError(f"no completion for {shell}")
    click.echo(kind(main, {}, "postgrad", "_POSTGRAD_COMPLETE").source())
