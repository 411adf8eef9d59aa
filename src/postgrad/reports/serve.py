"""Runs in a browser: a list, curves over one another, samples by what is in them; read-only.

A request names runs that were found in the given folders and nothing else, so no path is made from
what it says. What a run's folder holds is read piece by piece (`reports/following.py`) and shown as
text, and a page may run no script and load nothing but the files of this package.
"""

import math
import os
import platform
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from postgrad.access import Access, is_loopback, listening, new_token, token_from
from postgrad.errors import MissingExtra, PostgradError, unknown
from postgrad.reports.curves import by_importance, finite, readable, spoken
from postgrad.reports.figures import COLOURS, Series, line_chart
from postgrad.reports.following import (
    ENDED,
    Description,
    Followed,
    age,
    description_of,
    newest,
    state_of,
)
from postgrad.reports.page import asset, duration, rendered
from postgrad.reports.samples import sample
from postgrad.training.record import METRICS, RUN, SAMPLES, is_run

PORT = 8420
_ASSETS = ("figures.css", "page.css", "serve.css", "page.js", "figures.js", "cards.js", "serve.js")
_SCRIPTS = ("page.js", "figures.js", "cards.js", "serve.js")
_DEEPEST, _MOST_RUNS, _MOST_FOLLOWED = 6, 5000, 32
_RUNS, _FIGURES, _SAMPLES = 100, 24, 25  # on a page
_PIECES = 4  # of a file of samples, searched for a page
_LIVE, _BEHIND, _QUIET = 3.0, 0.3, 15.0  # seconds until a page asks again
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_REFUSALS = {
    HTTPStatus.UNAUTHORIZED: "A token is needed: open the address that `postgrad serve` printed.",
    HTTPStatus.FORBIDDEN: "Other sites may not load this.",
    HTTPStatus.MISDIRECTED_REQUEST: "This server answers on this machine's own names only.",
}


def serve(
    folders: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    token_env: str | None = None,
    say: Callable[[str], None],
) -> None:
    """Serve the runs below `folders` until the process is interrupted.

    Without `token_env`, the name of an environment variable with the token, a token is made up
    where other machines can reach `host`. Raises `PostgradError` for a folder that does not exist,
    an address that is taken, and a token that is missing or too short.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("uvicorn", "serve") from error
    shelf = Shelf(folders)
    token = token_from(token_env) if token_env else "" if is_loopback(host) else new_token()
    with closing(listening(host, port, "--port")) as socket:
        port = socket.getsockname()[1]
        app = application(shelf, Access(host, token, cookie=f"postgrad_{port}"))
        named = platform.node() if host in ("0.0.0.0", "::") else host
        named = f"[{named}]" if ":" in named else named
        address = f"http://{named}:{port}/"
        if token:
            address += f"?token={f'${token_env}' if token_env else token}"
        say(f"{len(shelf.runs())} runs, at {address} (Ctrl-C ends this)")
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,  # addresses may hold the token
            server_header=False,
            proxy_headers=False,
            limit_concurrency=64,
        )
        uvicorn.Server(config).run(sockets=[socket])


class Shelf:
    """The runs below some folders, found anew every other second; links are not followed."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = [folder.resolve() for folder in folders]
        for given, folder in zip(folders, self.folders, strict=True):
            if not folder.is_dir():
                raise PostgradError(f"{given} is not a folder")
        self._found: dict[str, Path] = {}
        self._looked = -math.inf
        self._followed: OrderedDict[str, Followed] = OrderedDict()
        self._descriptions: dict[tuple[str, int], Description | PostgradError] = {}

    def runs(self) -> dict[str, Path]:
        """Run folders by name, the newest first."""
        if time.monotonic() - self._looked > 2:
            found: dict[str, Path] = {}
            for folder in self.folders:
                self._look(folder, folder.name, 0, found)
            self._found = dict(sorted(found.items(), key=lambda item: -_changed(item[1] / RUN)))
            self._looked = time.monotonic()
        return self._found

    def _look(self, folder: Path, name: str, depth: int, found: dict[str, Path]) -> None:
        if len(found) >= _MOST_RUNS:
            return
        if is_run(folder):
            while name in found:  # folders of the same name in different places
                name += "'"
            found[name] = folder
            return
        if depth == _DEEPEST:
            return
        try:
            with os.scandir(folder) as entries:
                inner = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError:  # not ours to read, or gone meanwhile
            return
        for each in sorted(inner):
            if not each.startswith("."):
                self._look(folder / each, f"{name}/{each}", depth + 1, found)

    def folder(self, name: str) -> Path:
        """The folder of a run; an error for a name that was not found or leads elsewhere by now."""
        runs = self.runs()
        if name not in runs:
            raise unknown("run", name, runs)
        folder = runs[name]
        if folder.resolve() != folder:
            raise PostgradError(f"{name} is a link by now")
        return folder

    def describe(self, name: str) -> Description:
        """What a run is of. Raises `PostgradError` if its folder does not say it."""
        folder = self.folder(name)
        key = (name, _changed(folder / RUN))
        if key not in self._descriptions:
            if len(self._descriptions) > 2 * _MOST_RUNS:
                self._descriptions.clear()
            try:
                self._descriptions[key] = description_of(folder)
            except PostgradError as error:
                self._descriptions[key] = error
        found = self._descriptions[key]
        if isinstance(found, PostgradError):
            raise found
        return found

    def follow(self, name: str) -> Followed:
        """The run with what was written until now, up to a piece of its file."""
        folder = self.folder(name)
        if name not in self._followed:
            self._followed[name] = Followed(folder, name)
        self._followed.move_to_end(name)
        if len(self._followed) > _MOST_FOLLOWED:
            self._followed.popitem(last=False)[1].close()
        run = self._followed[name]
        run.refresh()
        return run


def _changed(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_mtime_ns
    except OSError:
        return 0


@dataclass(frozen=True)
class Filter:
    """Which samples are wanted: words in any text, a range of steps, a range of rewards."""

    text: str = ""
    step_from: float = -math.inf
    step_to: float = math.inf
    reward_from: float = -math.inf
    reward_to: float = math.inf

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Filter":
        """The filter of a form. Raises `PostgradError` for what is no number."""
        ranges = {
            name: _number(name, query[name])
            for name in ("step_from", "step_to", "reward_from", "reward_to")
            if query.get(name, "").strip()
        }
        return cls(query.get("text", "").strip(), **ranges)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if not self.step_from <= row["step"] <= self.step_to:
            return False
        if (self.reward_from, self.reward_to) != (-math.inf, math.inf):
            reward = row.get("reward")
            if not isinstance(reward, (int, float)):
                return False
            if not self.reward_from <= reward <= self.reward_to:
                return False
        return not self.text or self.text.lower() in _words(row).lower()


def _words(value: Any) -> str:
    """All texts within a row; the tokens of a list stand together."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "\n".join(map(_words, value.values()))
    if isinstance(value, list):
        whole = all(isinstance(item, str) for item in value)
        return ("" if whole else "\n").join(map(_words, value))
    return ""


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise PostgradError(f"{name.replace('_', ' ')}: expected a number, got {text!r}")
    return value


def list_page(shelf: Shelf, query: Mapping[str, str]) -> str:
    """The page of all runs, those whose name contains `q` where it is given."""
    words = query.get("q", "").strip().lower()
    names = [name for name in shelf.runs() if words in name.lower()]
    start = max(0, int(_number("start", query.get("start") or "0")))
    rows = [_listed(shelf, name) for name in names[start : start + _RUNS]]
    going = any(row["state"] == "running" for row in rows)
    more = start + _RUNS
    return _page(
        "serve_list.html",
        heading="Runs",
        facts=[("Runs", f"{len(shelf.runs()):,}")]
        + [("Folder", str(folder)) for folder in shelf.folders],
        rows=rows,
        words=query.get("q", ""),
        found=len(names),
        more="?" + urlencode({"q": words, "start": more}) if more < len(names) else "",
        every=_LIVE if going else _QUIET,
    )


def _listed(shelf: Shelf, name: str) -> dict[str, Any]:
    row = {"name": name, "state": "unreadable", "why": "", "method": "", "model": ""}
    row |= {"steps": "", "started": "", "age": ""}
    try:
        folder, about = shelf.folder(name), shelf.describe(name)
        state = state_of(folder)
        last = newest(folder / METRICS, 1, most=64_000).rows
        seconds = age(folder / METRICS)
    except (PostgradError, OSError) as error:
        return row | {"why": str(error)}
    step = last[0]["step"] if last else 0
    return row | {
        "state": state.name,
        "why": state.why,
        "method": about.method,
        "model": about.model,
        "steps": f"{step:,}" if step == about.steps else f"{step:,} of {about.steps:,}",
        "started": about.started[:16].replace("T", " "),
        "age": "" if seconds is None else _roughly(seconds),
    }


def _roughly(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return duration(seconds) if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def curves_page(shelf: Shelf, names: Sequence[str], query: Mapping[str, str]) -> str:
    """The page of curves of several runs over one another."""
    if not names:
        raise PostgradError("choose one or more runs first")
    names = list(dict.fromkeys(names))
    runs = [shelf.follow(name) for name in names[:COLOURS]]
    patterns = [word.strip() for word in query.get("metrics", "").split(",") if word.strip()]
    known = list(dict.fromkeys(name for run in runs for name in run.curves))
    wanted = [n for n in known if not patterns or any(fnmatch(n, p) for p in patterns)]
    chosen = by_importance(wanted)[:_FIGURES]
    notes = [
        f"{run.name}: {run.damaged} lines of metrics.jsonl are not readable."
        for run in runs
        if run.damaged
    ]
    if len(names) > COLOURS:
        notes.append(f"The first {COLOURS} of {len(names)} runs are drawn.")
    if len(wanted) > _FIGURES:
        notes.append(f"{_FIGURES} of {len(wanted)} metrics; name others above.")
    behind = sum(run.behind for run in runs)
    if behind > 1_000_000:
        notes.append(f"Still reading: {behind / 1e6:,.0f} MB are left.")
    going = any(run.state.name not in ENDED for run in runs)
    return _page(
        "serve_curves.html",
        heading=names[0] if len(names) == 1 else f"{len(names)} runs",
        facts=[],
        runs=[_legend(run, i) for i, run in enumerate(runs)],
        figures=[_figure(name, runs) for name in chosen],
        metrics=query.get("metrics", ""),
        names=names,
        known=by_importance(known),
        notes=notes,
        every=_BEHIND if behind > 1_000_000 else _LIVE if going else 0,
    )


def _legend(run: Followed, colour: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "colour": colour,
        "method": run.description.method,
        "model": run.description.model,
        "state": run.state.name,
        "why": run.state.why,
        "steps": f"{run.step:,} of {run.description.steps:,}",
        "samples": "/samples?" + urlencode({"run": run.name}),
    }


def _figure(name: str, runs: Sequence[Followed]) -> Any:
    series, odd = [], []
    for colour, run in enumerate(runs):
        if name in run.curves:
            known, note = finite(run.curves[name])
            line, raw = readable(known)
            series.append(Series(run.name, line, colour, raw=raw if len(runs) == 1 else ()))
            odd += [f"{run.name}: {note}" if len(runs) > 1 else note] if note else []
    return line_chart(spoken(name), series, note=" ".join(odd))


def samples_page(shelf: Shelf, name: str, query: Mapping[str, str]) -> str:
    """The page of a run's samples, the newest first, as far as a filter lets them pass."""
    folder = shelf.folder(name)
    wanted = Filter.of(query)
    before = query.get("before")
    at = None if before is None else int(_number("before", before))
    rows: list[dict[str, Any]] = []
    for _ in range(_PIECES):
        least = int(max(0, min(wanted.step_from, 2**53)))
        found = newest(
            folder / SAMPLES, _SAMPLES - len(rows), before=at, wanted=wanted, least_step=least
        )
        rows, at = rows + found.rows, found.before
        if at is None or len(rows) >= _SAMPLES:
            break
    kept = {key: value for key, value in query.items() if key != "before" and value}
    state = state_of(folder).name
    return _page(
        "serve_samples.html",
        heading=name,
        facts=[],
        name=name,
        state=state,
        query={key: query.get(key, "") for key in ("text", *_RANGES)},
        rows=[{"step": row["step"], **sample(row)} for row in rows],
        older="?" + urlencode({**kept, "run": name, "before": at}) if at is not None else "",
        newest="?" + urlencode({**kept, "run": name}) if before is not None else "",
        curves="/curves?" + urlencode({"run": name}),
        every=_LIVE if before is None and state not in ENDED else 0,
    )


_RANGES = ("step_from", "step_to", "reward_from", "reward_to")


def _page(template: str, **values: Any) -> str:
    return rendered(template, scripts=_SCRIPTS, **values)


def application(shelf: Shelf, access: Access) -> Any:
    """The ASGI application: pages and the files that they load, to who has access."""
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtra("starlette", "serve") from error

    lock = threading.Lock()

    def page(make: Callable[[Any], str]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            try:
                with lock:
                    text = make(request.query_params)
            except PostgradError as error:
                text = _page("serve_error.html", heading="Sorry", facts=[], why=str(error))
                return Response(text, HTTPStatus.BAD_REQUEST, media_type="text/html")
            return Response(text, media_type="text/html")

        return answer

    def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            return PlainTextResponse("no such file", HTTPStatus.NOT_FOUND)
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        return Response(asset(name), media_type=kind)

    routes = {
        "/": page(lambda query: list_page(shelf, query)),
        "/curves": page(lambda query: curves_page(shelf, query.getlist("run"), query)),
        "/samples": page(lambda query: samples_page(shelf, query.get("run", ""), query)),
    }
    app = Starlette(
        routes=[
            *(Route(path, answer, methods=["GET"]) for path, answer in routes.items()),
            Route("/assets/{name}", file, methods=["GET"]),
        ]
    )

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def send_safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), text.encode()) for name, text in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        request = Request(scope)
        given = request.query_params.get("token")
        refused = access.refusal(request.headers)
        answer: Any = app
        if refused == HTTPStatus.UNAUTHORIZED and given is not None and access.opens(given):
            # a link with the token: keep it in a cookie and out of the address
            rest = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
            path = request.url.path if request.url.path in routes else "/"
            answer = Response(None, HTTPStatus.SEE_OTHER, {"location": f"{path}?{urlencode(rest)}"})
            answer.set_cookie(access.cookie, given, httponly=True, samesite="lax")
        elif refused is not None:
            answer = PlainTextResponse(_REFUSALS[refused] + "\n", refused)
        await answer(scope, receive, send_safely)

    return guarded
