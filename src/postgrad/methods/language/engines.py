"""Which engine draws a policy's responses: its settings, and the one place where it is made."""

from typing import Literal

from postgrad import processes
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.engines import Engine
from postgrad.sampling.vllm_engine import VLLMEngine, VLLMServer


class EngineSettings(Settings):
    """What draws the responses, and how what is learnt from them is corrected for it."""

    engine: Literal["own", "vllm", "vllm-server"] = setting(
        "own", "what draws: this process's own sampling, vLLM within it, or a vLLM server"
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
    policy: LanguagePolicy, rollout: EngineSettings, place: Place, *, corrected: bool = False
) -> None:
    """Give the policy the engine that `rollout` asks for; called where a method finds its policy.

    The engine is closed by `Method.close`, and what it measures is among the metrics of each step.
    `corrected` says of the method that what it learns from samples is right though another program
    drew them: it weighs them, or takes them as what they are, whoever wrote them.

    Raises:
        PostgradError: the engine cannot be had, or not for this policy or method.
    """
    engine = made_engine(rollout, place)
    if engine is None:
        return
    if not engine.exact and not corrected and rollout.correction != "none":
        engine.close()
        raise PostgradError(
            f"rollout.correction: this method has no correction for what {rollout.engine} draws by "
            f"other probabilities: expected none, got {rollout.correction!r}"
        )
    policy.engine = engine


def made_engine(rollout: EngineSettings, place: Place) -> Engine | None:
    """The engine, or None where the policy draws for itself."""
    if rollout.engine != "own" and processes.count() > 1:
        raise PostgradError(
            f"rollout.engine: {rollout.engine!r} serves one training process, and there are "
            f"{processes.count()}: expected own"
        )
    if rollout.engine == "vllm":
        return VLLMEngine(rollout.cache_gib)
    if rollout.engine == "vllm-server":
        return VLLMServer(rollout.server, rollout.exchange, rollout.retries, rollout.patience)
    return None
