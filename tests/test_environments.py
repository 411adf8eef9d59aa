"""Environments that can be put back, interaction, replay and evaluation."""

import json
import sys

import gymnasium
import numpy as np
import pytest
import torch

from postgrad.errors import MissingExtra, PostgradError
from postgrad.evaluation.control import evaluate_policy
from postgrad.models.control import Policy, PolicyShape
from postgrad.sampling.environments import Environments, environment_maker
from postgrad.sampling.interaction import interact
from postgrad.sampling.replay import Replay
from postgrad.seeding import derive
from postgrad.training.tree import flatten, unflatten


class Recorder(gymnasium.Env):
    """Remembers the actions it was given; its reward is their sum, its observation the step."""

    def __init__(self, action_space, length=4):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = action_space
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.actions.append(action)
        done = len(self.actions) == self.length
        return np.full(1, len(self.actions), np.float32), np.sum(action), done, False, {}


class Restless(Recorder):
    """Rewards from a global generator: no seed of the environment's determines them."""

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, np.random.random(), terminated, truncated, info


def random_actions(count: int, environments: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, (count, environments), generator=torch.Generator().manual_seed(seed))


def test_steps_are_those_of_the_environments_one_by_one():
    environments = Environments(environment_maker("CartPole-v1"), 3, seed=5)
    alone = [gymnasium.make("CartPole-v1") for _ in range(3)]
    episode = [0, 0, 0]

    def first(index: int) -> np.ndarray:
        seed = derive(derive(5, "environment", index), episode[index]) % 2**31
        return alone[index].reset(seed=seed)[0]

    expected = np.stack([first(index) for index in range(3)])
    for actions in random_actions(120, 3):
        np.testing.assert_array_equal(environments.observations, expected)
        outcome = environments.step(actions)
        for index, environment in enumerate(alone):
            observation, reward, terminated, truncated, _ = environment.step(int(actions[index]))
            np.testing.assert_array_equal(outcome.observations[index], observation)
            assert outcome.rewards[index] == reward
            assert outcome.terminations[index] == terminated
            assert outcome.truncations[index] == truncated
            expected[index] = observation
            if terminated or truncated:
                episode[index] += 1
                expected[index] = first(index)
    assert min(episode) > 0
    assert environments.steps == 360


def test_time_limits_truncate_and_ends_terminate():
    cut = Environments(environment_maker("Pendulum-v1", episode_limit=5), 2, seed=0)
    played = interact(cut, lambda o, t: torch.zeros(2, 1), 7)
    assert played.truncations.nonzero()[:, 0].tolist() == [4, 4]
    assert not played.terminations.any()
    # the state arrived at is the episode's last one, and the next step starts anew
    assert not torch.equal(played.next_observations[4], played.observations[5])
    torch.testing.assert_close(played.next_observations[:4], played.observations[1:5])
    returns, lengths = played.episode_ends()
    assert lengths.view(7, 2)[4].tolist() == [5, 5]
    torch.testing.assert_close(returns.view(7, 2)[4], played.rewards[:5].sum(0))

    def both():
        discrete = gymnasium.spaces.Discrete(2)
        return gymnasium.wrappers.TimeLimit(Recorder(discrete, length=4), max_episode_steps=4)

    outcome = interact(Environments(both, 1, seed=0), lambda o, t: torch.ones(1).long(), 4)
    assert outcome.terminations[3].item()
    assert not outcome.truncations.any()


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_a_saved_state_continues_exactly(name):
    def act(environments: Environments, seed: int, steps: int) -> list[np.ndarray]:
        spaces = environments.spaces
        seen = []
        for noise in torch.rand(steps, 2, spaces.actions, generator=draw(seed)):
            actions = noise.argmax(-1) if spaces.discrete else noise
            outcome = environments.step(actions)
            seen += [outcome.observations, outcome.rewards, environments.observations.copy()]
        return seen

    def draw(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    make = environment_maker(name, episode_limit=30)
    environments = Environments(make, 2, seed=3)
    act(environments, 0, 50)
    structure, tensors = flatten(environments.state_dict())
    resumed = Environments(make, 2, seed=3)
    resumed.load_state_dict(unflatten(json.loads(json.dumps(structure)), tensors))
    np.testing.assert_array_equal(resumed.observations, environments.observations)
    assert resumed.steps == environments.steps
    for old, new in zip(act(environments, 1, 40), act(resumed, 1, 40), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_environment_that_does_not_repeat_itself_is_told():
    def make():
        return Restless(gymnasium.spaces.Discrete(2), length=50)

    environments = Environments(make, 1, seed=0)
    interact(environments, lambda o, t: torch.ones(1).long(), 5)
    with pytest.warns(UserWarning, match="'Restless' did not repeat its rewards"):
        Environments(make, 1, seed=0).load_state_dict(environments.state_dict())


def recorded(action_space, actions, **options):
    made = []

    def make():
        made.append(Recorder(action_space))
        return made[-1]

    environments = Environments(make, 1, seed=0, **options)
    environments.step(actions)
    return made[0].actions[0]


def test_actions_arrive_as_the_environment_takes_them():
    shifted = gymnasium.spaces.Discrete(3, start=-1)
    assert recorded(shifted, torch.tensor([0])) == -1
    box = gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))
    np.testing.assert_array_equal(recorded(box, torch.tensor([[-3.0, 2.0]])), [-1, 2])
    scaled = recorded(box, torch.tensor([[-1.0, 0.5]]), unit_actions=True)
    np.testing.assert_array_equal(scaled, [-1, 3])
    square = gymnasium.spaces.Box(-1, 1, (2, 2))
    assert recorded(square, torch.zeros(1, 4)).shape == (2, 2)


def test_observations_that_are_not_vectors_become_vectors():
    lake = Environments(environment_maker("FrozenLake-v1"), 2, seed=0)
    assert lake.spaces.observations == 16
    np.testing.assert_array_equal(lake.observations, np.eye(16)[[0, 0]])


def test_faults_name_the_environment_and_what_was_expected():
    with pytest.raises(PostgradError, match=r"unknown environment 'CartPol-v1'.*'CartPole-v\d'"):
        environment_maker("CartPol-v1")()
    with pytest.raises(PostgradError, match="unknown environment 'CartPole-v7'"):
        environment_maker("CartPole-v7")()
    with pytest.raises(PostgradError, match="absent_package"):
        environment_maker("absent_package:Thing-v0")()
    with pytest.raises(PostgradError, match=r"environment 'no good name!'"):
        environment_maker("no good name!")()
    with pytest.raises(PostgradError, match=r"environment_settings: .*'gravitas'"):
        environment_maker("Pendulum-v1", {"gravitas": 3})()
    with pytest.raises(PostgradError, match="'Recorder' has actions MultiDiscrete"):
        Environments(lambda: Recorder(gymnasium.spaces.MultiDiscrete([2, 2])), 1, seed=0)


def test_missing_packages_name_their_extra(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(MissingExtra, match=r"postgrad\[mujoco\]"):
        environment_maker("InvertedPendulum-v5")()
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingExtra, match=r"postgrad\[control\]"):
        environment_maker("CartPole-v1")()


def test_settings_reach_the_environment():
    made = environment_maker("Pendulum-v1", {"g": 3.5}, episode_limit=9)()
    assert made.unwrapped.g == 3.5
    assert made.spec.max_episode_steps == 9


def test_replay_keeps_the_last_items():
    replay = Replay(5)
    for start in (0, 3, 6):
        replay.add(
            number=torch.arange(start, start + 3), double=2.0 * torch.arange(start, start + 3)
        )
    drawn = replay.draw(500, torch.Generator().manual_seed(0))
    assert set(drawn["number"].tolist()) == {4, 5, 6, 7, 8}
    torch.testing.assert_close(drawn["double"], 2.0 * drawn["number"])
    # from a saved state it overwrites the same places
    other = Replay(5)
    other.load_state_dict(replay.state_dict())
    for each in (replay, other):
        each.add(number=torch.tensor([9]), double=torch.tensor([18.0]))
    one, two = (each.draw(50, torch.Generator().manual_seed(1)) for each in (replay, other))
    assert torch.equal(one["number"], two["number"])
    assert 4 not in one["number"]


def test_replay_refuses_what_does_not_fit():
    replay = Replay(2)
    with pytest.raises(ValueError, match="nothing to draw from"):
        replay.draw(1, torch.Generator())
    with pytest.raises(ValueError, match="3 items do not fit into a replay of 2"):
        replay.add(number=torch.arange(3))
    replay.add(number=torch.arange(2))
    with pytest.raises(ValueError, match="equally many"):
        replay.add(other=torch.arange(2))
    with pytest.raises(ValueError, match="at least 1"):
        Replay(0)


def test_evaluation_plays_the_same_episodes_and_counts_each_once():
    policy = Policy(PolicyShape("categorical", 4, 2, (8,), False), torch.Generator())
    make = environment_maker("CartPole-v1")
    before = torch.get_rng_state()
    first, second = evaluate_policy(policy, make, 4), evaluate_policy(policy, make, 4)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())
    assert 8 <= first["return"] == first["episode_length"] <= 500
    # one episode more can only add its own return
    fewer = evaluate_policy(policy, make, 3)
    last = 4 * first["return"] - 3 * fewer["return"]
    assert last == pytest.approx(round(last))
    assert last >= 8
