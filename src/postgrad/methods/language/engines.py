"""Which engine draws a policy's responses: its settings, and the one place where it is made."""

from functools import partial
from typing import Literal

from postgrad import processes
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.cluster import ClusterEngine, ClusterSettings
from postgrad.sampling.engines import Engine
from postgrad.sampling.first import EngineOfFirst
from postgrad.sampling.vllm_engine import VLLMEngine, VLLMServer


class EngineSettings(Settings):
    """What draws the responses, and how what is learnt from them is corrected for it."""

    engine: Literal["own", "vllm", "vllm-server"] = setting(
        "own", "what draws: this process's own sampling, vLLM within it, or a vLLM server"
    )
    workers: int = setting(
        0, "Ray actors that draw, each with a copy of the policy; 0: this process", ge=0
    )
    address: str | None = setting(
        None, "the workers' Ray cluster; RAY_ADDRESS, or one started for the run, when empty"
    )
    worker_cpus: int = setting(1, "cores, and threads, of a worker", gt=0)
    worker_gpus: float | None = setting(
        None, "GPUs of a worker; 1 where training is on a GPU when empty", ge=0
    )
    chunk: int = setting(
        8, "responses handed to a worker at a time, at least; a prompt's stay together", gt=0
    )
    stale: int = setting(
        0, "steps that workers draw ahead, by weights as many steps old; 0: on-policy", ge=0
    )
    worker_patience: float = setting(
        600.0,
        "seconds in which a cluster has to have room, and a worker to come up when all are lost",
        gt=0,
    )
    cache_gib: float = setting(4.0, "engine=vllm: GiB that it keeps for keys and values", gt=0)
    server: str = setting(
        "http://127.0.0.1:8000",
        "engine=vllm-server: its address; its token is in the variable VLLM_API_KEY",
    )
    exchange: str = setting(
        "/dev/shm", "engine=vllm-server: a folder both see, through which weights are handed over"
    )
    retries: int = setting(
        4, "engine=vllm-server: how often a draw is tried again, after 1, 2, 4 … seconds", ge=0
    )
    patience: float = setting(600.0, "engine=vllm-server: seconds one request may take", gt=0)
    correction: Literal["truncated", "none"] = setting(
        "truncated",
        "where an engine's probabilities differ from the trainer's: truncated importance weights",
        source="Yao et al. 2025",
    )
    correction_cap: float = setting(
        2.0, "the largest such weight of a token", gt=0, source="Yao et al. 2025"
    )


def attach_engine(
    policy: LanguagePolicy,
    rollout: EngineSettings,
    place: Place,
    *,
    corrected: bool = False,
    ahead: bool = False,
) -> None:
    """Give the policy the engine that `rollout` asks for; called where a method finds its policy.

    The engine is closed by `Method.close`, and what it measures is among the metrics of each step.
    `corrected` says of the method that what it learns from samples is right though another program
    drew them: it weighs them, or takes them as what they are, whoever wrote them.
    `ahead` says whether the method can learn from responses of older weights, drawn ahead.

    Raises:
        PostgradError: the engine cannot be had, or not for this policy or method.
    """
    if rollout.stale and not ahead:
        why = "learns from responses of its present policy"
        raise not_older("rollout.stale", rollout.stale, why)
    if rollout.stale and not rollout.workers:
        raise PostgradError(
            "rollout.stale: workers draw ahead, and rollout.workers is 0; in this process "
            f"sync_delay={rollout.stale} has the same effect"
        )
    if rollout.workers and rollout.engine == "vllm-server":
        raise PostgradError(
            "rollout.workers: a vLLM server draws by itself: expected 0 with "
            f"rollout.engine=vllm-server, got {rollout.workers}"
        )
    if rollout.engine == "vllm" and not rollout.workers and processes.count() > 1:
        raise PostgradError(
            "rollout.engine: vLLM within a process serves that one alone, and there are "
            f"{processes.count()}: expected vllm-server, or rollout.workers above 0"
        )

    def made() -> Engine | None:
        return cluster_engine(policy, rollout, place) or made_engine(rollout, place)

    elsewhere = rollout.workers > 0 or rollout.engine != "own"
    engine = EngineOfFirst(made) if elsewhere and processes.count() > 1 else made()
    if engine is None:
        return
    if not engine.exact and not corrected and rollout.correction != "none":
        engine.close()
        raise PostgradError(
            f"rollout.correction: this method has no correction for what {rollout.engine} draws by "
            f"other probabilities: expected none, got {rollout.correction!r}"
        )
    policy.engine = engine


def not_older(key: str, value: int, reason: str) -> PostgradError:
    """The error where responses cannot be of older weights, as a method does what `reason` says."""
    return PostgradError(f"{key}: this method {reason}: expected 0, got {value}")


def cluster_engine(
    policy: LanguagePolicy, rollout: EngineSettings, place: Place
) -> ClusterEngine | None:
    """The engine of `rollout.workers`, each with the engine that `made_engine` gives it."""
    if not rollout.workers:
        return None
    gpus = rollout.worker_gpus
    if gpus is None:
        gpus = 1.0 if place.device.type == "cuda" else 0.0
    settings = ClusterSettings(
        workers=rollout.workers,
        address=rollout.address,
        cpus=rollout.worker_cpus,
        gpus=gpus,
        chunk=rollout.chunk,
        patience=rollout.worker_patience,
    )
    within = partial(made_engine, rollout, place)
    return ClusterEngine(policy, settings, within, exact=rollout.engine == "own")


def made_engine(rollout: EngineSettings, place: Place) -> Engine | None:
    """The engine, or None where the policy draws for itself."""
    if rollout.engine == "vllm":
        return VLLMEngine(rollout.cache_gib)
    if rollout.engine == "vllm-server":
        return VLLMServer(rollout.server, rollout.exchange, rollout.retries, rollout.patience)
    return None
