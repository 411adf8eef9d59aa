"""Language models that are asked and never trained: judges, black boxes, writers of feedback.

They are asked in one way, wherever they run: in this process (`LocalChat`) or behind any server
that speaks OpenAI's chat API, such as vLLM, llama.cpp, Ollama or a provider's (`ServerChat`).
"""

import hashlib
import importlib.util
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from pydantic import model_validator

from postgrad.config import Settings, setting
from postgrad.errors import MissingExtra, PostgradError
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.models.text_network import Message
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.seeding import derive

__all__ = ["ChatModel", "ChatSettings", "LocalChat", "Prompt", "ServerChat", "load_chat"]

Prompt = str | list[Message]

_TOGETHER = 64  # answers sampled at once by a local model
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds between tries of a request


class ChatModel(Protocol):
    """What can be asked: the classes below, and any function of this signature."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[str]]:
        """`n` texts for every prompt.

        Args:
            prompts: conversations, or plain texts that stand for one user's turn.
            n: answers a prompt; at temperature 0 they are the same.
            max_tokens: an answer is cut after so many.
            temperature: 0 takes the most probable token.
            stop: an answer ends before the first of these strings.
            seed: of the draws. Answers to different prompts, and the `n` to one, are independent.
        """
        ...


class ChatSettings(Settings):
    """A language model to ask; a plain string is its name."""

    name: str = setting(
        "smollm2", "smollm2, tiny, a local folder or a Hub id; with a server its name there"
    )
    server: str | None = setting(
        None, "address of an OpenAI-compatible server, e.g. http://localhost:8000/v1; if empty the "
        "model runs in this process"
    )  # fmt: skip
    key_variable: str = setting(
        "OPENAI_API_KEY", "environment variable that holds the server's key, if it wants one"
    )
    time_limit: float = setting(60.0, "seconds that a server may leave a request unanswered", gt=0)
    retries: int = setting(
        5, "how often a request is repeated, after growing pauses, before the run stops", ge=0
    )
    concurrency: int = setting(8, "requests to a server at the same time", gt=0)
    cache: str | None = setting(None, "file that keeps every answer, so that none is asked twice")
    trust_remote_code: bool = setting(False, "run code that a model repository brings along")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def load_chat(settings: ChatSettings, device: str | torch.device = "cpu") -> "RememberingChat":
    """The language model that the settings name.

    Raises:
        PostgradError: there is no such model, or the server's address is none.
        MissingExtra: an optional package is needed.
    """
    if settings.server is not None:
        return ServerChat(
            settings.name,
            settings.server,
            key_variable=settings.key_variable,
            time_limit=settings.time_limit,
            retries=settings.retries,
            concurrency=settings.concurrency,
            cache=settings.cache,
        )
    policy = load_policy(
        settings.name, device=device, trust_remote_code=settings.trust_remote_code
    ).requires_grad_(False)
    return LocalChat(policy, cache=settings.cache)


@dataclass
class Counts:
    """How many answers were wanted, and how many of them the model had to give."""

    wanted: int = 0
    given: int = 0


@dataclass(frozen=True)
class _Request:
    prompt: Prompt
    seed: int


class RememberingChat(ABC):
    """A `ChatModel` that is never asked the same twice.

    An answer is a function of model, prompt, settings and seed, so it is kept under these: in
    memory, and with `cache` in a file of JSON lines, which any number of runs may share. `counts`
    says what was asked.
    """

    def __init__(self, identity: str, cache: str | Path | None):
        self.counts = Counts()
        self._identity = identity
        self._file = Path(os.path.expanduser(cache)) if cache is not None else None
        self._known: dict[str, str] = {} if self._file is None else _opened(self._file)

    @abstractmethod
    def _answers(
        self, requests: list[_Request], settings: SamplingSettings
    ) -> Iterator[tuple[int, str]]:
        """The position of each request with the answer to it, as they come."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[str]]:
        """`n` texts for every prompt (see `ChatModel`).

        Raises:
            PostgradError: an answer cannot be had. There is never one in its place.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        settings = SamplingSettings(max_tokens, temperature, stop=tuple(stop))
        draws = n if temperature > 0 else 1
        requests = [
            _Request(prompt, derive(seed, _text(prompt), i) if temperature > 0 else 0)
            for prompt in prompts
            for i in range(draws)
        ]
        keys = [self._key(request, settings) for request in requests]
        missing = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if key not in self._known
        }
        order = list(missing)
        for place, text in self._answers(list(missing.values()), settings):
            self._keep(order[place], text)
        self.counts.wanted += n * len(prompts)
        texts = [self._known[key] for key in keys]
        return [texts[i : i + draws] * (n // draws) for i in range(0, len(texts), draws)]

    def _key(self, request: _Request, settings: SamplingSettings) -> str:
        parts = [
            self._identity,
            request.prompt,
            settings.max_new_tokens,
            float(settings.temperature),
            settings.stop,
            request.seed,
        ]
        return hashlib.sha256(_text(parts).encode()).hexdigest()

    def _keep(self, key: str, text: str) -> None:
        self._known[key] = text
        self.counts.given += 1
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "text": text}) + "\n")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _opened(file: Path) -> dict[str, str]:
    """The answers in a cache file, which is made if it is not there."""
    known = {}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", encoding="utf-8") as lines:
            lines.seek(0)
            text = lines.read()
            if text and not text.endswith("\n"):
                lines.write("\n")  # a run was killed while it wrote: the next line is a new one
    except OSError as error:
        raise PostgradError(f"cache: {file} cannot be used: {error.strerror}") from error
    for line in text.splitlines():
        try:
            row = json.loads(line)
            known[row["key"]] = row["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # half a line: its answer is asked for again
    return known


class LocalChat(RememberingChat):
    """A language policy in this process, whose weights must not change any more.

    A plain prompt is a user's turn where the model has a chat template, and else the text itself.
    """

    def __init__(self, policy: LanguagePolicy, *, cache: str | Path | None = None):
        super().__init__(_fingerprint(policy), cache)
        self._policy = policy

    def _answers(
        self, requests: list[_Request], settings: SamplingSettings
    ) -> Iterator[tuple[int, str]]:
        for start in range(0, len(requests), _TOGETHER):
            part = requests[start : start + _TOGETHER]
            ids = [self._policy.render(self._conversation(request.prompt)) for request in part]
            drawn = generate(self._policy, ids, settings, seeds=[r.seed for r in part])
            for place, text in enumerate(drawn.texts, start):
                yield place, _before(text, settings.stop)

    def _conversation(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str) and self._policy.has_chat_template:
            return [{"role": "user", "content": prompt}]
        return prompt


@torch.no_grad()
def _fingerprint(policy: LanguagePolicy) -> str:
    """Tells models apart by sums of their weights."""
    sums = [float(weight.double().sum()) for weight in policy.state_dict().values()]
    return hashlib.sha256(_text(sums).encode()).hexdigest()


def _before(text: str, stop: Sequence[str]) -> str:
    places = [text.find(word) for word in stop if word in text]
    return text[: min(places)] if places else text


class ServerChat(RememberingChat):
    """A model behind a server with OpenAI's chat API.

    Every answer is a request of its own with a seed of its own, because many servers do not know
    `n`; whether a seed repeats an answer is up to the server, so a resumed run that needs the same
    ones wants a `cache` file. What fails for want of a connection, by a limit of the rate or by an
    error of the server is asked again after growing pauses; then, or at any other error, the run
    stops with one line.

    The key is read from an environment variable and appears in no message and no file.
    """

    def __init__(
        self,
        name: str,
        server: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        time_limit: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        cache: str | Path | None = None,
    ):
        address = urlsplit(server)
        if address.scheme not in ("http", "https") or not address.hostname or address.password:
            raise PostgradError(
                "server: expected an address such as http://localhost:8000/v1, without a password "
                "in it"
            )
        if importlib.util.find_spec("openai") is None:
            raise MissingExtra("openai", "server")
        import openai

        super().__init__(f"{name} at {server}", cache)
        self._name = name
        self._server = server
        self._key_variable = key_variable
        self._retries = retries
        self._concurrency = concurrency
        self._client = openai.OpenAI(
            base_url=server,
            api_key=os.environ.get(key_variable) or "none",
            timeout=time_limit,
            max_retries=0,
        )

    def _answers(
        self, requests: list[_Request], settings: SamplingSettings
    ) -> Iterator[tuple[int, str]]:
        over = Event()
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            running = {
                pool.submit(self._persistently, request, settings, over): place
                for place, request in enumerate(requests)
            }
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            over.set()  # after a failure nothing more is asked
            pool.shutdown(wait=False, cancel_futures=True)

    def _persistently(self, request: _Request, settings: SamplingSettings, over: Event) -> str:
        import openai

        for tried in itertools.count():
            try:
                return self._once(request, settings)
            except openai.OpenAIError as error:
                if tried == self._retries or not _passing(error) or over.is_set():
                    raise self._failure(error, tried) from None
                over.wait(_pause(error, tried))
        raise AssertionError  # a loop without an end

    def _once(self, request: _Request, settings: SamplingSettings) -> str:
        prompt = request.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        create: Any = self._client.chat.completions.create  # plain dictionaries are messages too
        answer = create(
            model=self._name,
            messages=messages,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=request.seed % 2**31,
            **({"stop": list(settings.stop)} if settings.stop else {}),
        )
        choices = getattr(answer, "choices", None)
        if not choices:
            raise self._failure("no chat completion came back (such addresses often end in /v1)")
        return _before(choices[0].message.content or "", settings.stop)

    def _failure(self, problem: object, retries: int = 0) -> PostgradError:
        line = " ".join(str(problem).split()).replace(self._client.api_key, "***")[:300]
        if getattr(problem, "status_code", None) in (401, 403):
            line += f" (its key is read from the environment variable {self._key_variable})"
        often = f" after {retries} retries" if retries else ""
        return PostgradError(f"{self._name} at {self._server} did not answer{often}: {line}")


def _passing(error: Any) -> bool:
    """Whether asking again may help."""
    status = getattr(error, "status_code", None)  # none: no connection, or no answer in time
    return status is None or status in (408, 409, 429) or status >= 500


def _pause(error: Any, tried: int) -> float:
    """Seconds before the next try: what the server asks for, or twice as many every time."""
    response = getattr(error, "response", None)
    asked = response.headers.get("retry-after", "") if response is not None else ""
    return min(_LONGEST_PAUSE, float(asked) if asked.isdigit() else _FIRST_PAUSE * 2**tried)
