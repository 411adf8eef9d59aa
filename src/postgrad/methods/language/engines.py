"""Which engine draws a policy's responses: its settings, and the one place where it is made."""

from functools import partial
from typing import Literal

from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.cluster import ClusterEngine, ClusterSettings
from postgrad.sampling.engines import Engine


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
    patience: float = setting(
        120.0, "seconds in which a worker has to come up when all others are lost", gt=0
    )


def attach_engine(
    policy: LanguagePolicy, rollout: EngineSettings, place: Place, *, ahead: bool = False
) -> None:
    """Give the policy the engine that `rollout` asks for; called where a method finds its policy.

    The engine is closed by `Method.close`, and what it measures is among the metrics of each step.
    `ahead` says whether the method can learn from responses of older weights, drawn ahead.

    Raises:
        PostgradError: the engine cannot be had, or not for this policy or method.
    """
    if rollout.stale and not ahead:
        raise not_ahead(rollout, "learns from responses of its present policy")
    if rollout.stale and not rollout.workers:
        raise PostgradError(
            "rollout.stale: workers draw ahead, and rollout.workers is 0; in this process "
            f"sync_delay={rollout.stale} has the same effect"
        )
    engine = cluster_engine(policy, rollout, place) or made_engine(policy, rollout, place)
    if engine is not None:
        policy.engine = engine


def not_ahead(rollout: EngineSettings, reason: str) -> PostgradError:
    """The error where nothing can be drawn ahead, as this method does what `reason` says."""
    return PostgradError(f"rollout.stale: this method {reason}: expected 0, got {rollout.stale}")


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
        patience=rollout.patience,
    )
    within = partial(made_engine, rollout=rollout, place=place)
    return ClusterEngine(policy, settings, within, exact=rollout.engine == "own")


def made_engine(policy: LanguagePolicy, rollout: EngineSettings, place: Place) -> Engine | None:
    """The engine, or None where the policy draws for itself."""
    return None
