"""Gymnasium environments, several at once in this process, that can be put back to where they were.

An environment's inner state cannot be saved without pickle. But an episode is determined by the
seed of its reset and by its actions, so these are what a checkpoint holds: on resume the unfinished
episode of each environment is reset with its seed and played again. That is exact for every
environment that is deterministic given its seed.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from postgrad.errors import MissingExtra, PostgradError, unknown
from postgrad.seeding import derive

if TYPE_CHECKING:
    import gymnasium

MakeEnvironment = Callable[[], "gymnasium.Env[Any, Any]"]


def environment_maker(
    name: str, settings: dict[str, Any] | None = None, episode_limit: int | None = None
) -> MakeEnvironment:
    """A function that makes the Gymnasium environment `name` (for one's own: `module:Name-v0`).

    `settings` are the environment's keyword arguments; `episode_limit` replaces its time limit.
    The function raises `PostgradError` for an unknown id, a setting that the environment does not
    take, or a package that it needs and that is missing.
    """

    def make() -> "gymnasium.Env[Any, Any]":
        gymnasium = _gymnasium()
        limit = {} if episode_limit is None else {"max_episode_steps": episode_limit}
        try:
            environment = gymnasium.make(
                name, disable_env_checker=True, **limit, **(settings or {})
            )
        except gymnasium.error.UnregisteredEnv as error:
            raise unknown("environment", name, gymnasium.registry) from error
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            raise _missing(name, error) from error
        except gymnasium.error.Error as error:
            raise PostgradError(f"environment {name!r}: {_line(error)}") from error
        except TypeError as error:
            if settings and any(f"'{key}'" in str(error) for key in settings):
                raise PostgradError(f"environment_settings: {_line(error)}") from error
            raise
        return environment

    return make


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise MissingExtra("gymnasium", "control") from error
    return gymnasium


def _missing(name: str, error: Exception) -> PostgradError:
    gymnasium = _gymnasium()
    spec = gymnasium.registry.get(name)
    if spec is not None and "mujoco" in str(spec.entry_point):
        missing = error.name if isinstance(error, ImportError) and error.name else "mujoco"
        return MissingExtra(missing, "mujoco")
    return PostgradError(f"environment {name!r} cannot be made: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Spaces:
    """What a policy must know of an environment: sizes, kind of action, bounds of the actions."""

    observations: int
    actions: int
    discrete: bool
    first_action: int = 0
    low: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0))
    high: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0))
    action_shape: tuple[int, ...] = ()

    @property
    def bounded(self) -> bool:
        """Whether actions are continuous with finite bounds."""
        return not self.discrete and bool(np.isfinite([self.low, self.high]).all())


def spaces_of(environment: "gymnasium.Env[Any, Any]") -> Spaces:
    """The spaces of an environment whose observations are vectors, or a `PostgradError`."""
    gymnasium = _gymnasium()
    seen, done = environment.observation_space, environment.action_space
    assert seen.shape is not None  # observations are vectors
    size = seen.shape[0]
    if isinstance(done, gymnasium.spaces.Discrete):
        return Spaces(size, int(done.n), True, first_action=int(done.start))
    if isinstance(done, gymnasium.spaces.Box) and np.issubdtype(done.dtype, np.floating):
        low, high = done.low.reshape(-1), done.high.reshape(-1)
        return Spaces(size, len(low), False, 0, low, high, done.shape)
    raise PostgradError(
        f"environment {_name(environment)!r} has actions {done}: "
        "expected a Discrete or a continuous Box space"
    )


@dataclass(frozen=True)
class EpisodeEnd:
    """The environment it was played in, its sum of rewards, and its number of steps."""

    index: int
    total: float
    length: int


@dataclass(frozen=True)
class Outcome:
    """What one step led to: the state really arrived at (before any reset), reward and end.

    An episode that both terminated and reached its time limit counts as terminated.
    """

    observations: np.ndarray[Any, Any]
    rewards: np.ndarray[Any, Any]
    terminations: np.ndarray[Any, Any]
    truncations: np.ndarray[Any, Any]
    finished: list[EpisodeEnd]


class Episodes:
    """One environment playing episode after episode, remembering the present one's actions."""

    def __init__(self, environment: "gymnasium.Env[Any, Any]", seed: int):
        self.environment = environment
        self.total = 0.0
        self.length = 0
        self._seed = seed
        self._number = -1
        self._actions: list[Any] = []

    def begin(self) -> np.ndarray[Any, Any]:
        """Start the next episode and return its first observation."""
        self._number += 1
        return self._reset()

    def _reset(self) -> np.ndarray[Any, Any]:
        self._actions, self.total, self.length = [], 0.0, 0
        # some environments take seeds of 31 bits only
        observation, _ = self.environment.reset(seed=derive(self._seed, self._number) % 2**31)
        return np.asarray(observation, np.float32)

    def step(self, action: Any) -> tuple[np.ndarray[Any, Any], float, bool, bool]:
        """One step: observation, reward, terminated, truncated."""
        self._actions.append(action)
        observation, reward, terminated, truncated, _ = self.environment.step(action)
        self.total += float(reward)
        self.length += 1
        return observation, float(reward), bool(terminated), bool(truncated)

    def state_dict(self) -> dict[str, Any]:
        return {
            "number": self._number,
            "actions": np.asarray(self._actions),
            "total": self.total,
        }

    def replay(self, state: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Put the environment back to where `state_dict` was taken; its observation there."""
        self._number = state["number"]
        observation = self._reset()
        actions = state["actions"]
        for action in actions.tolist() if actions.ndim == 1 else actions:
            observation = np.asarray(self.step(action)[0], np.float32)
        if self.total != state["total"]:
            warnings.warn(
                f"environment {_name(self.environment)!r} did not repeat its rewards when its "
                "actions were repeated: it is not deterministic, and the resumed run continues "
                "from another state",
                stacklevel=2,
            )
        return observation


class Environments:
    """`count` environments, each playing one episode after another.

    `observations` `[count, d]` (float32) are the present ones. Actions are integers `[count]`
    from 0 or vectors `[count, A]`, which are cut to the bounds; with `unit_actions` they lie in
    [-1, 1] and are scaled to the bounds. Episode j of environment i is seeded by (seed, i, j).
    """

    def __init__(self, make: MakeEnvironment, count: int, seed: int, *, unit_actions: bool = False):
        self._episodes = [
            Episodes(_flattened(make()), derive(seed, "environment", index))
            for index in range(count)
        ]
        self.spaces = spaces_of(self._episodes[0].environment)
        self._unit_actions = unit_actions
        self.observations = np.stack([episode.begin() for episode in self._episodes])
        self.steps = 0

    def __len__(self) -> int:
        return len(self._episodes)

    def step(self, actions: Tensor) -> "Outcome":
        """One step of every environment; where an episode ended, the next one has begun."""
        count = len(self._episodes)
        arrived = np.empty_like(self.observations)
        rewards = np.empty(count, np.float32)
        ends = np.zeros((2, count), bool)
        finished: list[EpisodeEnd] = []
        for index, action in enumerate(self._native(actions)):
            episode = self._episodes[index]
            arrived[index], reward, terminated, truncated = episode.step(action)
            rewards[index] = reward
            if terminated or truncated:
                ends[:, index] = terminated, truncated and not terminated
                finished.append(EpisodeEnd(index, episode.total, episode.length))
        self.observations = arrived
        if finished:
            self.observations = arrived.copy()
            for episode_end in finished:
                self.observations[episode_end.index] = self._episodes[episode_end.index].begin()
        self.steps += count
        return Outcome(arrived, rewards, ends[0], ends[1], finished)

    def restart(self) -> None:
        """Give up the episodes being played and begin the next ones."""
        self.observations = np.stack([episode.begin() for episode in self._episodes])

    @property
    def episode_limit(self) -> int | None:
        """The steps after which an episode is cut, where the environment says so."""
        spec = self._episodes[0].environment.spec
        return spec.max_episode_steps if spec is not None else None

    def _native(self, actions: Tensor) -> Any:
        """The actions as the environments take them."""
        spaces = self.spaces
        if spaces.discrete:
            return (actions + spaces.first_action).tolist()
        vectors = actions.numpy()
        if self._unit_actions:
            vectors = spaces.low + 0.5 * (vectors + 1) * (spaces.high - spaces.low)
        vectors = np.clip(vectors, spaces.low, spaces.high)
        return vectors.reshape(-1, *spaces.action_shape)

    def unfinished(self) -> list[EpisodeEnd]:
        """The episodes being played, as if they had ended now."""
        return [
            EpisodeEnd(index, episode.total, episode.length)
            for index, episode in enumerate(self._episodes)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "episodes": [episode.state_dict() for episode in self._episodes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play every unfinished episode again from its seed and its actions."""
        self.steps = state["steps"]
        for index, (episode, saved) in enumerate(
            zip(self._episodes, state["episodes"], strict=True)
        ):
            self.observations[index] = episode.replay(saved)


def _flattened(environment: "gymnasium.Env[Any, Any]") -> "gymnasium.Env[Any, Any]":
    """The environment with vectors as observations, whatever they were."""
    gymnasium = _gymnasium()
    space = environment.observation_space
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return environment
    if not space.is_np_flattenable:
        raise PostgradError(
            f"environment {_name(environment)!r} has observations {space}, "
            "which cannot be made a vector"
        )
    return gymnasium.wrappers.FlattenObservation(environment)


def _name(environment: "gymnasium.Env[Any, Any]") -> str:
    return environment.spec.id if environment.spec else type(environment.unwrapped).__name__
