"""A run's newest metrics for Prometheus, over HTTP while the run goes on."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from socket import socket
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from postgrad.access import Access, listening, token_from
from postgrad.errors import MissingExtra


@dataclass(frozen=True)
class Place:
    """Where to listen; a token is demanded if the environment variable `token_env` is named."""

    host: str
    port: int
    token_env: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Place":
        """From the settings of the loop."""
        names = ("host", "port", "token_env")
        return cls(**{name: config[f"prometheus_{name}"] for name in names})

    def access(self) -> Access:
        return Access(self.host, token_from(self.token_env) if self.token_env else "")

    def listening(self) -> socket:
        return listening(self.host, self.port, "prometheus_port")

    def check(self) -> None:
        """Raise what `serve` would, before a run begins: no package, no token, a port taken."""
        _package()
        self.access()
        self.listening().close()


def serve(
    place: Place, run: Path, method: str, step: int
) -> Callable[[int | None, dict[str, float]], None]:
    """Serve `/metrics`; the function that is returned takes a step's metrics, and None to end.

    A metric `reward/format` is the gauge `postgrad_reward_format` with the labels `run`, `method`
    and, as two names may become the same, `metric` with the name as it was. The counter
    `postgrad_steps_total` is the last step.
    """
    package = _package()
    latest: dict[str, float] = {}
    last = step

    class Collector:
        def collect(self) -> Iterator[Any]:
            labels = ["run", "method"]
            values = [run.name, method]
            steps = package.core.CounterMetricFamily("postgrad_steps", "Steps done.", labels=labels)
            steps.add_metric(values, last)
            yield steps
            families: dict[str, Any] = {}
            for name, value in dict(latest).items():
                key = "postgrad_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
                if key not in families:
                    families[key] = package.core.GaugeMetricFamily(
                        key, "The newest value.", labels=[*labels, "metric"]
                    )
                families[key].add_metric([*values, name], value)
            yield from families.values()

    registry = package.CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    metrics, access = package.make_wsgi_app(registry), place.access()

    def app(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        headers = {
            key.removeprefix("HTTP_").replace("_", "-").lower(): value
            for key, value in environment.items()
            if key.startswith("HTTP_")
        }
        refused = access.refusal(headers)
        if refused is None and environment["REQUEST_METHOD"] != "GET":
            refused = HTTPStatus.METHOD_NOT_ALLOWED
        if refused is None and environment["PATH_INFO"] != "/metrics":
            refused = HTTPStatus.NOT_FOUND
        if refused is not None:
            start(f"{refused.value} {refused.phrase}", [("Content-Type", "text/plain")])
            return [f"{refused.phrase}\n".encode()]
        return metrics(environment, start)

    server = _Server(place.listening())
    server.set_app(app)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()

    def track(step: int | None, values: dict[str, float]) -> None:
        nonlocal last
        if step is None:
            server.shutdown()
            server.server_close()
            thread.join()
            return
        last = max(last, step)
        latest.update(values)

    return track


class _Server(ThreadingMixIn, WSGIServer):
    """A WSGI server on a socket that listens already."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, opened: socket):
        super().__init__(opened.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = opened
        self.server_name, self.server_port = opened.getsockname()[:2]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds without a word from who asks

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are nothing that belongs among a run's lines."""


def _package() -> Any:
    try:
        import prometheus_client.core
    except ImportError as error:
        raise MissingExtra("prometheus-client", "prometheus") from error
    return prometheus_client
