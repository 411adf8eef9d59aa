"""Rewards from a server: batches of samples go out side by side as JSON, rewards come back.

The protocol is one request, `POST` to the server's address, and docs/rewards.md says it in full:

    {"prompts": [...], "completions": [...], "columns": {"answer": [...]}}  ->  {"rewards": [...]}
"""

import asyncio
import functools
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from postgrad.config import Settings, setting, validated
from postgrad.errors import MissingExtra, PostgradError
from postgrad.notices import say
from postgrad.rewards.running import gathered, outcome

_SCHEMES = ("http://", "https://")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between tries
_FIRST_RETRIES = 2  # before the run begins
_LONGEST_ANSWER = 8 * 2**20  # bytes; far more than the rewards of any batch
_SHOWN = 100  # characters of an answer in an error


class ServerSettings(Settings):
    """How a reward server is asked."""

    url: str = setting("", "where requests go, e.g. http://localhost:8000/score", min_length=1)
    time_limit: float = setting(60.0, "seconds until a request is answered in full", gt=0)
    retries: int = setting(
        8, "further tries after no connection, no answer in time, 429 and 5xx", ge=0
    )
    batch: int = setting(64, "completions in one request", gt=0)
    concurrency: int = setting(8, "requests under way at a time", gt=0)
    columns: list[str] | None = setting(None, "columns of the data to send; all when empty")
    token_variable: str | None = setting(
        None,
        "environment variable with the bearer token; POSTGRAD_REWARD_TOKEN, if set, when empty",
    )


_TOKEN = "POSTGRAD_REWARD_TOKEN"


def is_server(spec: Any) -> bool:
    """Whether a specification of a reward means a server."""
    if isinstance(spec, Mapping):
        return "url" in spec or is_server(spec.get("name"))
    return isinstance(spec, str) and spec.lower().startswith(_SCHEMES)


class _Passing(Exception):
    """A failure after which another try may help; `pause` is the one the server asks for."""

    def __init__(self, problem: str, pause: float | None = None):
        super().__init__(problem)
        self.pause = pause


class RewardServer:
    """A reward function behind HTTP, called as any other: `prompts`, `completions`, columns.

    The order of rewards is that of the completions, whichever request is answered first.

    Raises:
        PostgradError: an address, setting or token that cannot be used.
    """

    keeps_time = True  # every request has a limit

    def __init__(self, name: str | None, settings: Mapping[str, Any]):
        what = f"reward {name or settings.get('url')!r}"
        try:
            self._settings = validated(ServerSettings, settings)
            address = urlsplit(self._settings.url)
            _ = address.port  # raises where it is no number
        except PostgradError as error:
            raise PostgradError(f"{what}: {error}") from error
        except ValueError as error:
            raise PostgradError(f"{what}: {error}") from error
        if address.username is not None or address.password is not None:
            raise PostgradError(
                f"reward server {address.hostname}: its address holds a password, which would be "
                f"written into the run folder: give a token by the variable {_TOKEN}"
            )
        if not self._settings.url.lower().startswith(_SCHEMES) or not address.hostname:
            raise PostgradError(f"{what}: expected an address such as http://localhost:8000/score")
        if importlib.util.find_spec("httpx2") is None:
            raise MissingExtra("httpx2", "remote")
        self.name = name or address.netloc + address.path
        self._retries = self._settings.retries
        self._token()

    @contextmanager
    def briefly(self) -> Iterator[None]:
        """Inside, it is soon given up, as nothing has been computed yet that would be lost."""
        self._retries = min(_FIRST_RETRIES, self._settings.retries)
        try:
            yield
        finally:
            self._retries = self._settings.retries

    async def __call__(
        self, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> list[Any]:
        import httpx2

        chosen = self._chosen(columns)
        size = self._settings.batch
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        async with httpx2.AsyncClient(
            headers=headers, timeout=None, verify=_certificates()
        ) as client:
            starts = range(0, len(completions), size)
            calls = []
            for start in starts:
                part = slice(start, start + size)
                body = self._body(prompts[part], completions[part], chosen, part)
                calls.append(
                    functools.partial(self._ask, client, body, start, len(completions[part]))
                )
            tried = await gathered(calls, self._settings.concurrency)
        parts = [outcome(one, f"reward {self.name!r}", None) for one in tried]
        return [reward for part in parts for reward in part]

    def _token(self) -> str | None:
        variable = self._settings.token_variable
        token = os.environ.get(variable or _TOKEN)
        if variable and not token:
            raise PostgradError(
                f"reward {self.name!r}: token_variable: the environment has no {variable}"
            )
        if token and not (token.isascii() and token.isprintable()):
            raise PostgradError(
                f"reward {self.name!r}: the token in {variable or _TOKEN} holds characters that "
                "cannot be sent"
            )
        return token

    def _chosen(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        wanted = self._settings.columns
        for name in wanted or ():
            if name not in columns:
                raise PostgradError(
                    f"reward {self.name!r} needs the column {name!r}; the data has the columns "
                    f"{', '.join(columns) or 'prompt only'}"
                )
        return {name: columns[name] for name in (columns if wanted is None else wanted)}

    def _body(
        self,
        prompts: list[Any],
        completions: list[Any],
        columns: Mapping[str, list[Any]],
        part: slice,
    ) -> bytes:
        sent: dict[str, Any] = {"prompts": prompts, "completions": completions}
        named = {**sent, **{name: values[part] for name, values in columns.items()}}
        for name, values in named.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise PostgradError(
                    f"reward {self.name!r}: {name} cannot be sent as JSON ({error}); "
                    "columns: names those to be sent"
                ) from error
        cut = {name: named[name] for name in columns}
        return json.dumps({**sent, "columns": cut}, ensure_ascii=True).encode()

    async def _ask(self, client: Any, body: bytes, start: int, count: int) -> list[Any]:
        """The rewards of completions `start` to `start + count`, asked for until they come."""
        of = (
            f"completions {start + 1} to {start + count}"
            if count > 1
            else f"completion {start + 1}"
        )
        began = time.monotonic()
        for tried in range(self._retries + 1):
            try:
                return self._read(await self._answer(client, body), count)
            except _Passing as problem:
                pause = min(_LONGEST_PAUSE, problem.pause or _FIRST_PAUSE * 2**tried)
                if tried == self._retries:
                    spent = time.monotonic() - began
                    more = f" ({tried + 1} tries in {spent:.0f} s)" if tried else ""
                    raise self._failure(of, f"{problem}{more}") from None
                say(f"reward {self.name!r}: {problem}; asking again in {pause:g} s")
                await asyncio.sleep(pause)
            except PostgradError as problem:
                raise self._failure(of, str(problem)) from None
        raise AssertionError  # the last try returns or raises

    async def _answer(self, client: Any, body: bytes) -> str:
        """The text of an answer that says that all went well."""
        import httpx2

        limit = self._settings.time_limit
        received = bytearray()
        try:
            async with (
                asyncio.timeout(limit),
                client.stream("POST", self._settings.url, content=body) as response,
            ):
                async for chunk in response.aiter_raw():
                    received += chunk
                    if len(received) > _LONGEST_ANSWER:
                        raise PostgradError(
                            f"answered with more than {_LONGEST_ANSWER // 2**20} MiB"
                        )
        except TimeoutError:
            raise _Passing(f"no answer within its limit of {limit:g} seconds") from None
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise _Passing(f"no answer ({reason})") from None
        except httpx2.HTTPError as error:
            raise PostgradError(f"cannot be asked ({error})") from error
        text = received.decode("utf-8", errors="replace")
        status = f"status {response.status_code} {response.reason_phrase}".strip()
        if response.status_code == 429 or response.status_code >= 500:
            asked = response.headers.get("retry-after", "")
            raise _Passing(status + _quoted(text), float(asked) if asked.isdigit() else None)
        if 300 <= response.status_code < 400:
            place = response.headers.get("location", "").partition("?")[0]
            raise PostgradError(f"{status}: it redirects to {place!r}: give the final address")
        if response.status_code in (401, 403):
            variable = self._settings.token_variable or _TOKEN
            raise PostgradError(f"{status} (its token is read from the variable {variable})")
        if response.status_code != 200:
            raise PostgradError(status + _quoted(text))
        return text

    def _read(self, text: str, count: int) -> list[Any]:
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise PostgradError(f"the answer is not JSON{_quoted(text)}") from None
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise PostgradError(f'expected {{"rewards": [...]}}, got{_quoted(text)[1:]}')
        if len(rewards) != count:
            raise PostgradError(f"{len(rewards)} rewards came, expected {count}")
        return rewards

    def _failure(self, of: str, problem: str) -> PostgradError:
        address = self._settings.url.partition("?")[0]
        where = "" if self.name in address else f" at {address}"
        line = f"reward {self.name!r}{where}, {of}: {' '.join(problem.split())}"
        token = self._token()
        return PostgradError(line.replace(token, "***") if token else line)


@functools.cache
def _certificates() -> Any:
    """What servers' certificates are checked against; reading it takes a third of a second."""
    import httpx2

    return httpx2.create_ssl_context()


def _quoted(text: str) -> str:
    shown = " ".join(text.split())
    if not shown:
        return ": nothing"
    return f": {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + '…'}"
