"""Evaluating control policies: returns of whole episodes that are the same for every policy."""

from pathlib import Path
from typing import Any

import torch

from postgrad.errors import PostgradError
from postgrad.models.control import Policy, load_policy
from postgrad.sampling.environments import Environments, MakeEnvironment, environment_maker

EVALUATION_SEED = 20_050_981
LONGEST_EPISODE = 10_000


@torch.inference_mode()
def evaluate_policy(policy: Policy, make: MakeEnvironment, episodes: int) -> dict[str, float]:
    """Mean return and length of `episodes` first episodes, taking the policy's likeliest action.

    The episodes' seeds are fixed, so all policies face the same ones. An episode without an end is
    cut after 10,000 steps.
    """
    device = next(policy.parameters()).device
    unit = policy.shape.kind == "squashed-gaussian"
    environments = Environments(make, episodes, EVALUATION_SEED, unit_actions=unit)
    found = (environments.spaces.observations, environments.spaces.actions)
    learned = (policy.shape.observations, policy.shape.actions)
    if found != learned:
        raise PostgradError(
            "the environment has {} observations and {} actions, the policy learned with {} and "
            "{}".format(*found, *learned)
        )
    first: dict[int, Any] = {}
    for _ in range(LONGEST_EPISODE):
        observations = torch.from_numpy(environments.observations).to(device)
        for end in environments.step(policy.act(observations).cpu()).finished:
            first.setdefault(end.index, end)
        if len(first) == episodes:
            break
    for end in environments.unfinished():
        first.setdefault(end.index, end)
    return {
        "return": sum(end.total for end in first.values()) / episodes,
        "episode_length": sum(end.length for end in first.values()) / episodes,
    }


def evaluate_saved_policy(
    folder: Path, episodes: int = 10, environment: str | None = None
) -> dict[str, float]:
    """`evaluate_policy` for the policy that a run saved in `folder`.

    In its own environment, or in another one by its Gymnasium id.
    """
    policy, own = load_policy(folder)
    if environment is None:
        make = environment_maker(own["name"], own["settings"], own["episode_limit"])
    else:
        make = environment_maker(environment, {}, None)
    return evaluate_policy(policy, make, episodes)
