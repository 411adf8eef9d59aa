"""Which engine draws a policy's responses: its settings, and the one place where it is made."""

from typing import Literal

from postgrad.config import Settings, setting
from postgrad.methods.base import Place
from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.engines import Engine


class EngineSettings(Settings):
    """What draws the responses, and how what is learnt from them is corrected for it."""

    engine: Literal["own", "vllm", "vllm-server"] = setting(
        "own", "what draws: this process's own sampling, vLLM within it, or a vLLM server"
    )


def attach_engine(policy: LanguagePolicy, rollout: EngineSettings, place: Place) -> None:
    """Give the policy the engine that `rollout` asks for; called where a method finds its policy.

    The engine is closed by `Method.close`, and what it measures is among the metrics of each step.

    Raises:
        PostgradError: the engine cannot be had, or not for this policy.
    """
    engine = made_engine(policy, rollout, place)
    if engine is not None:
        policy.engine = engine


def made_engine(policy: LanguagePolicy, rollout: EngineSettings, place: Place) -> Engine | None:
    """The engine, or None where the policy draws for itself."""
    return None
