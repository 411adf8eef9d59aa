"""vLLM draws: within this process, or behind its server. Both take up weights without a restart.

vLLM has kernels and roundings of its own, so that its probabilities differ from the trainer's by
the same weights; neither engine is `exact`.
"""

import importlib.util
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from postgrad.errors import MissingExtra, PostgradError
from postgrad.models.exporting import (
    checksum,
    exported_weights,
    is_tied,
    save_weights,
    untied_config,
)
from postgrad.models.network import base_of
from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.drawing import SamplingSettings
from postgrad.sampling.engines import Drawn, Wanted

TOKEN = "VLLM_API_KEY"  # the variable that vLLM's server reads its token from, too
_AT_ONCE = 64  # requests that wait for the server side by side
_PROBE = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "detokenize": False}}
_LONGEST_WAIT = 30.0  # seconds between two tries


class _Clock:
    """Seconds and counts by name since they were last asked for."""

    def __init__(self) -> None:
        self._found: dict[str, float] = {}

    def add(self, name: str, amount: float) -> None:
        self._found[name] = self._found.get(name, 0.0) + amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def taken(self) -> dict[str, float]:
        found, self._found = self._found, {}
        return found


class VLLMEngine:
    """vLLM within this process; it starts when it is first asked to draw.

    Args:
        cache_gib: memory for keys and values, taken at the start; the context is as long as fits.
    """

    exact = False

    def __init__(self, cache_gib: float = 4.0):
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtra("vllm", "vllm")
        self._cache = int(cache_gib * 2**30)
        self._engine: Any = None
        self._held: tuple[float, ...] | None = None  # the checksum of the weights that it has
        self._clock = _Clock()

    def draw(self, policy: LanguagePolicy, wanted: Wanted) -> list[Drawn]:
        with _undisturbed():
            if self._engine is None:
                with self._clock.timed("engine/start_seconds"):
                    try:
                        self._engine = self._started(policy)
                    except PostgradError:
                        _leave_groups()
                        raise
            self._take_up(policy)
            requests = [
                _request(policy, wanted.settings, seed, limit)
                for seed, limit in zip(wanted.seeds, wanted.limits, strict=True)
            ]
            return self._drawn_by(policy, wanted.prompts, requests)

    def _drawn_by(
        self, policy: LanguagePolicy, prompts: Sequence[Tensor], requests: list[dict[str, Any]]
    ) -> list[Drawn]:
        from vllm import SamplingParams

        longest = self._engine.llm_engine.model_config.max_model_len
        for prompt, request in zip(prompts, requests, strict=True):
            limit = request["max_tokens"]
            if len(prompt) + limit > longest:
                raise PostgradError(
                    f"rollout.cache_gib: {self._cache / 2**30:g} GiB hold a context of {longest} "
                    f"tokens, but a prompt of {len(prompt)} with a response of up to {limit} needs "
                    f"{len(prompt) + limit}: give more"
                )
        with (
            self._clock.timed("engine/draw_seconds"),
            _without_compiling(policy.device),
            _one_lined(),
        ):
            outputs = self._engine.generate(
                [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
                [SamplingParams(**request) for request in requests],
                use_tqdm=False,
            )
        drawn = []
        for output in outputs:
            (one,) = output.outputs
            logprobs = [
                here[token].logprob for token, here in zip(one.token_ids, one.logprobs, strict=True)
            ]
            drawn.append(_drawn(list(one.token_ids), logprobs, one.finish_reason))
        return drawn

    def _started(self, policy: LanguagePolicy) -> Any:
        """vLLM with the policy's architecture and tokenizer, and without its weights yet."""
        # the weights are handed over as tensors, which another process could not be
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        with tempfile.TemporaryDirectory(prefix="postgrad-vllm-") as folder:
            # vLLM packs an output layer apart on CPUs: tied, it would keep what it started with
            untied_config(policy.whole_network).save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            on_cpu = policy.device.type == "cpu"
            with _one_lined():
                from vllm import LLM

                return LLM(
                    model=folder,
                    load_format="dummy",
                    dtype=_sampling_dtype(policy),
                    max_model_len=-1,
                    kv_cache_memory_bytes=self._cache,
                    enforce_eager=on_cpu,
                    # a prompt in two chunks turns a response's generator back, which no CPU's can
                    enable_chunked_prefill=not on_cpu,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    enable_prefix_caching=True,
                )

    def _take_up(self, policy: LanguagePolicy) -> None:
        """Give it the policy's present weights, unless it has them."""
        now = checksum(policy.whole_network)
        if now == self._held:
            return
        with self._clock.timed("engine/weights_seconds"), _one_lined():
            weights = exported_weights(policy.whole_network)
            self._held = None
            self._engine.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": list(weights.items())}
            )
            self._engine.reset_prefix_cache()  # keys and values of the weights before
            self._held = now

    def metrics(self) -> dict[str, float]:
        return self._clock.taken()

    def close(self) -> None:
        if self._engine is None:
            return
        self._engine.llm_engine.engine_core.shutdown()
        self._engine = self._held = None
        _leave_groups()


class VLLMServer:
    """A vLLM server that somebody else started, with its development interface on.

    Weights go through a folder that both see. A server that does not answer, or that comes back
    with other weights, is asked again and given the weights again.

    Args:
        address: of the server, as http://127.0.0.1:8000; its token is in the environment variable
            VLLM_API_KEY.
        exchange: the folder for weights; in memory by default.
        retries: how often a failed draw is tried again, after 1, 2, 4 … seconds.
        patience: seconds that one request may take.
    """

    exact = False

    def __init__(self, address: str, exchange: str, retries: int = 4, patience: float = 600.0):
        self._address = _checked_address(address)
        self._retries = retries
        if importlib.util.find_spec("httpx2") is None:
            raise MissingExtra("httpx2", "remote")
        import httpx2

        token = os.environ.get(TOKEN)
        self._client = httpx2.Client(
            base_url=self._address,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(patience, connect=5.0),
            limits=httpx2.Limits(max_connections=_AT_ONCE),
        )
        try:
            self._context = self._checked_server()
            self._exchange = self._own_folder(exchange)
        except BaseException:
            self._client.close()
            raise
        self._held: tuple[float, ...] | None = None
        self._version: str | None = None  # what the server calls the weights that we gave it
        self._clock = _Clock()

    def draw(self, policy: LanguagePolicy, wanted: Wanted) -> list[Drawn]:
        if self._on_cpu and is_tied(policy.whole_network):
            raise PostgradError(
                "rollout.server: behind a server on CPUs vLLM cannot take up the weights of an "
                "output layer that is tied to the embeddings: train and serve a copy made by "
                "postgrad.models.exporting.save_untied, or set rollout.engine=vllm"
            )
        requests = []
        for prompt, seed, limit in zip(wanted.prompts, wanted.seeds, wanted.limits, strict=True):
            if len(prompt) + limit > self._context:
                raise PostgradError(
                    f"rollout.server: {self._address} serves a context of {self._context} tokens, "
                    f"but a prompt of {len(prompt)} with a response of up to {limit} needs "
                    f"{len(prompt) + limit}: start it with a larger --max-model-len"
                )
            parameters = _request(policy, wanted.settings, seed, limit)
            requests.append({"token_ids": prompt.tolist(), "sampling_params": parameters})

        def draw_all() -> list[Drawn]:
            self._take_up(policy)
            with (
                self._clock.timed("engine/draw_seconds"),
                ThreadPoolExecutor(min(_AT_ONCE, len(requests))) as threads,
            ):
                drawn = list(threads.map(self._draw_one, requests))
            if self._version_there() != self._version:
                raise _Unreachable("its weights were replaced while it drew")
            return drawn

        return self._tried(draw_all)

    def _draw_one(self, request: dict[str, Any]) -> Drawn:
        (one,) = self._post("/inference/v1/generate", request)["choices"]
        logprobs = [float(place["logprob"]) for place in one["logprobs"]["content"]]
        return _drawn(one["token_ids"], logprobs, one["finish_reason"])

    def _tried(self, action: Callable[[], list[Drawn]]) -> list[Drawn]:
        """The action's outcome, tried again where the server is at fault."""
        for tried in range(self._retries + 1):
            try:
                return action()
            except _Unreachable as problem:
                reason = problem
            self._version = None  # whoever answers next may be another process
            self._clock.add("engine/retries", 1.0)
            if tried < self._retries:
                time.sleep(min(2.0**tried, _LONGEST_WAIT))
        raise PostgradError(
            f"rollout.server: {self._address} does not answer, tried {self._retries + 1} times; "
            f"the last time: {reason}"
        )

    # Weights ---------------------------------------------------------------------------------

    def _take_up(self, policy: LanguagePolicy) -> None:
        now = checksum(policy.whole_network)
        if (
            now == self._held
            and self._version is not None
            and self._version_there() == self._version
        ):
            return
        with self._clock.timed("engine/weights_seconds"):
            try:
                save_weights(policy.whole_network, self._exchange / "model.safetensors")
            except OSError as problem:
                raise PostgradError(
                    f"rollout.exchange: cannot write the weights into {self._exchange}: "
                    f"{_one_line(problem)}"
                ) from problem
            self._post(
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(self._exchange)}},
            )
            self._post("/reset_prefix_cache")  # keys and values of the weights before
            version = uuid.uuid4().hex
            self._post("/update_weight_version", {"new_version": version})
            (self._exchange / "model.safetensors").unlink()
        self._held, self._version = now, version

    def _version_there(self) -> str | None:
        version: str | None = self._get("/weight_info").get("weight_version")
        return version

    def _own_folder(self, exchange: str) -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix="postgrad-", dir=exchange))
        except OSError as problem:
            raise PostgradError(
                f"rollout.exchange: cannot make a folder in {exchange!r}: {_one_line(problem)}"
            ) from problem

    # Requests --------------------------------------------------------------------------------

    def _checked_server(self) -> int:
        """How long a context it serves, if it is one that can be used."""
        try:
            models = self._get("/v1/models")
            served = self._get("/server_info", config_format="json")["vllm_config"]
            self._post("/inference/v1/generate", _PROBE)
        except _Unreachable as problem:
            raise PostgradError(
                f"rollout.server: {self._address} does not answer: {problem}"
            ) from problem
        self._on_cpu = served["device_config"]["device"] == "cpu"
        mode = served["model_config"].get("logprobs_mode")
        if mode != "processed_logprobs":
            raise PostgradError(
                f"rollout.server: {self._address} gives {mode!r}, expected log-probabilities at "
                "the sampling temperature: start it with --logprobs-mode processed_logprobs"
            )
        return int(models["data"][0]["max_model_len"])

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        return self._answer("GET", path, params=query)

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._answer("POST", path, json=body)

    def _answer(self, kind: str, path: str, **request: Any) -> dict[str, Any]:
        import httpx2

        try:
            response = self._client.request(kind, path, **request)
        except httpx2.TransportError as problem:
            raise _Unreachable(_one_line(problem) or type(problem).__name__) from problem
        if response.status_code == 403:
            raise PostgradError(
                f"rollout.server: {self._address} has {path} switched off: start it with "
                "--enable-scale-out"
            )
        if response.status_code == 401:
            raise PostgradError(
                f"rollout.server: {self._address} refuses the token: expected the server's own in "
                f"the environment variable {TOKEN}"
            )
        if response.status_code == 404:
            raise PostgradError(
                f"rollout.server: {self._address} has no {path}: start vLLM 0.32 or newer with "
                "VLLM_SERVER_DEV_MODE=1 in its environment"
            )
        if response.is_server_error:
            raise _Unreachable(f"{path} answers {response.status_code}")
        if response.is_error:
            raise PostgradError(
                f"rollout.server: {self._address}{path} answers {response.status_code}: "
                f"{_one_line(response.text)[:200]}"
            )
        if not response.content:
            return {}
        try:
            answer = response.json()
        except ValueError as problem:
            raise PostgradError(
                f"rollout.server: {self._address}{path} answers no JSON: is it a vLLM server?"
            ) from problem
        return answer if isinstance(answer, dict) else {"answer": answer}

    def metrics(self) -> dict[str, float]:
        return self._clock.taken()

    def close(self) -> None:
        self._client.close()
        shutil.rmtree(self._exchange, ignore_errors=True)


class _Unreachable(Exception):
    """The server is away, or not the one that it was."""


def _request(
    policy: LanguagePolicy, settings: SamplingSettings, seed: int, limit: int
) -> dict[str, Any]:
    """vLLM's settings of one response."""
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "seed": seed,
        "max_tokens": limit,
        "stop": list(settings.stop),
        "include_stop_str_in_output": True,
        # the policy's own end tokens, and no others that a tokenizer or a model's files may name
        "ignore_eos": True,
        "stop_token_ids": sorted(policy.end_tokens),
        "logprobs": 0,  # of the token that was drawn, and of no other
        "detokenize": bool(settings.stop),
    }


def _drawn(tokens: list[int], logprobs: list[float], reason: str | None) -> Drawn:
    if reason not in ("stop", "length") or not tokens:
        raise PostgradError(f"rollout.engine: vLLM gave up on a response: {reason}")
    return Drawn(torch.tensor(tokens), torch.tensor(logprobs), reason == "stop")


def _sampling_dtype(policy: LanguagePolicy) -> torch.dtype:
    """What this process would sample in."""
    device = policy.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = base_of(policy.whole_network).dtype
    return dtype


def _leave_groups() -> None:
    """End what vLLM has begun of torch.distributed, so that another one can start."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@contextmanager
def _one_lined() -> Iterator[None]:
    """What vLLM raises in the midst of its own code, in one line that the user can act on."""
    try:
        yield
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as problem:
        raise PostgradError(
            f"rollout.engine: vLLM cannot run this model: {_one_line(problem)}"
        ) from problem


@contextmanager
def _undisturbed() -> Iterator[None]:
    """vLLM seeds and uses the process's generators, and takes torch.set_num_threads away."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)


@contextmanager
def _without_compiling(device: torch.device) -> Iterator[None]:
    """On CPUs compiling its small helpers takes longer than they ever do."""
    if device.type != "cpu":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _checked_address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PostgradError(
            f"rollout.server: expected an address like http://127.0.0.1:8000, got {address!r}"
        )
    if parts.username or parts.password:
        raise PostgradError(
            "rollout.server: expected an address without a user or password in it, which would be "
            f"written into the run folder: a token goes into the environment variable {TOKEN}"
        )
    return address.rstrip("/")


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())
