"""Self-play for control: the queue, how trajectories are rewarded, learning, resuming, faults."""

import json
import shutil

import gymnasium
import numpy as np
import pytest
import torch

from postgrad.advantages.pairing import PreferenceQueue
from postgrad.api import resume, train
from postgrad.catalogue import method_class
from postgrad.config import resolve
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.rewards.preferences import higher_return

SMALL = {
    "steps_per_iteration": 128,
    "environments": 4,
    "hidden": [16],
    "evaluation_episodes": 4,
    "episode_limit": 10,
    "queue": 6,
    "log": [],
    "report": False,
}
PREFERENCE = """
def right(first, second):
    gaps = [float(a["actions"].float().sum() - b["actions"].float().sum())
            for a, b in zip(first, second)]
    return [0.5 + 0.5 * (gap > 0) - 0.5 * (gap < 0) for gap in gaps]
"""


class Walk(gymnasium.Env):
    """Ten steps left or right; with `stop` an episode ends early with that chance a step."""

    def __init__(self, stop=0.0):
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.stop = stop

    def seen(self):
        return np.float32([self.place / 10, self.time / 10])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.time = 0
        return self.seen(), {}

    def step(self, action):
        self.place += 2 * int(action) - 1
        self.time += 1
        over = bool(self.np_random.random() < self.stop)
        return self.seen(), float(2 * int(action) - 1), over, self.time == 10, {}


def made(environment=Walk, **settings):
    kind = method_class("spo-self-play-control")
    objects = {name: settings.pop(name) for name in ("preference",) if name in settings}
    _, own = resolve(kind.Config, kind.recipe, {**SMALL, **settings})
    return kind(own, Place(seed=3, steps=4), environment=environment, **objects)


def path(*rewards):
    return {"rewards": torch.tensor(rewards)}


def test_the_queues_worked_example():
    """A queue of four, of which three lose; H = 50."""
    queue = PreferenceQueue(4)
    for worth in (1.0, 3.0, 0.5, 1.5):
        queue.push(path(worth))

    def signed(first, second):
        return [2 * p - 1 for p in higher_return(first, second)]

    reward = queue.reward(path(2.0), signed)
    assert reward == pytest.approx(0.5)
    assert reward / 50 == pytest.approx(0.01)
    queue.push(path(9.0))  # the oldest, 1.0, leaves
    assert len(queue) == 4
    assert queue.reward(path(2.0), signed) == pytest.approx(0.0)
    copies = PreferenceQueue(3)
    for _ in range(3):
        copies.push(path(2.0))
    assert copies.reward(path(2.0), signed) == 0


def test_what_is_no_queue_or_preference_is_named():
    with pytest.raises(ValueError, match="size of at least 1"):
        PreferenceQueue(0)
    queue = PreferenceQueue(2)
    with pytest.raises(ValueError, match="the queue is empty"):
        queue.reward(path(1.0), lambda first, second: [0.0])
    queue.push(path(1.0))
    for odd in ([1.5], [0.0, 0.0], [float("nan")]):
        with pytest.raises(ValueError, match=r"expected 1 preferences in \[-1, 1\]"):
            queue.reward(path(1.0), lambda first, second, odd=odd: odd)


def test_ties_are_undecided():
    assert higher_return([path(1.0, 2.0)] * 3, [path(3.0), path(2.0), path(4.0)]) == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("stop", [0.0, 0.15])
def test_a_trajectorys_steps_sum_to_its_preference_over_the_queue(stop):
    method = made(lambda: Walk(stop))
    for step in range(2):
        opponents = [t["rewards"].sum() for t in method.queue.state_dict()["kept"]]
        batch = method.collect(step)
        trajectories = torch.arange(len(batch))[batch.episode_lengths > 0]
        assert len(trajectories) >= 12
        # fields are [T * B] without unfinished episodes; an episode's steps are told by its reward
        for last in trajectories.tolist():
            total = float(batch.rewards[last] * batch.episode_lengths[last])
            assert -1 <= total <= 1
        if step == 0:
            continue
        first = trajectories[0]
        own = batch.episode_returns[first]
        signs = [float((own - other).sign()) for other in opponents]
        got = float(batch.rewards[first] * batch.episode_lengths[first])
        assert got == pytest.approx(sum(signs) / len(signs), abs=1e-6)


@pytest.mark.parametrize("stop", [0.0, 0.15])
def test_steps_of_unfinished_episodes_are_left_out(stop):
    method = made(lambda: Walk(stop))
    batch = method.collect(0)
    ended = batch.episode_lengths > 0
    assert len(batch) == int(batch.episode_lengths.sum()) < 128
    # every trajectory's reward comes back from its steps
    total = (batch.rewards[ended] * batch.episode_lengths[ended]).sum()
    torch.testing.assert_close(batch.rewards.sum(), total, atol=1e-5, rtol=1e-5)
    assert float(batch.advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(batch.advantages.std(correction=0)) == pytest.approx(1, abs=1e-4)
    # nothing of the sum lies beyond an end: the return of a last step is its own reward
    plain = made(lambda: Walk(stop), normalise_rewards=False, gae_lambda=1.0).collect(0)
    ended = plain.episode_lengths > 0
    torch.testing.assert_close(plain.returns[ended], plain.rewards[ended], atol=1e-6, rtol=1e-5)


def test_every_iteration_begins_with_fresh_episodes():
    method = made()
    for step in range(2):
        batch = method.collect(step)
        assert batch.observations[:4].tolist() == [[0.0, 0.0]] * 4


def test_flipped_verdicts_turn_preferences_round():
    plain, noisy = made().collect(0), made(flip_rate=0.5).collect(0)
    assert plain.episode_returns.equal(noisy.episode_returns)

    def agreement(batch):
        ended = batch.episode_lengths > 0
        returns = batch.episode_returns[ended]
        return float(torch.corrcoef(torch.stack([returns, batch.rewards[ended]]))[0, 1])

    assert agreement(plain) > 0.8
    assert agreement(noisy) < 0.7


def test_an_undecided_preference_teaches_nothing():
    method = made(preference=lambda first: [0.5] * len(first))
    batch = method.collect(0)
    assert not batch.rewards.any()


def learnt(folder, **settings):
    run = train(
        "spo-self-play-control",
        environment=Walk,
        **{**SMALL, "steps_per_iteration": 320},
        steps=15,
        learning_rate=3e-3,
        output=str(folder / "run"),
        **settings,
    )
    return run.evaluation["return"]


def test_it_learns_what_is_preferred(tmp_path):
    assert learnt(tmp_path, flip_rate=0.2) == 10.0


def test_a_preference_of_ones_own_may_ask_for_the_opposite(tmp_path):
    def left(first, second):
        return [1 - p for p in higher_return(first, second)]

    assert learnt(tmp_path, preference=left) == -10.0


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))}
        for row in found
    ]


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
def test_an_interrupted_run_continues_exactly(environment, tmp_path):
    (tmp_path / "judge.py").write_text(PREFERENCE)
    whole = train(
        "spo-self-play-control",
        **{**SMALL, "environment": environment, "episode_limit": 30, "flip_rate": 0.1},
        preference=f"{tmp_path / 'judge.py'}:right",
        steps=4,
        save_every=2,
        output=str(tmp_path / "whole"),
        seed=1,
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    resumed = resume(tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    for name, module in whole.method.modules().items():
        other = resumed.method.modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), (name, key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episode_limit": 33}, "may not hold a whole episode of 33: at least 132 are needed"),
        ({"episode_limit": None}, "a whole episode of 500: at least 2000 are needed"),
        ({"queue": 0}, "queue: .*greater than 0"),
        ({"flip_rate": 0.6}, "flip_rate: "),
        ({"preference": "nowhere.py:f"}, "no such file nowhere.py"),
    ],
)
def test_faults_are_said_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(PostgradError, match=message):
        train(
            "spo-self-play-control", **{**SMALL, **settings}, steps=1, output=str(tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()


def test_an_environment_without_a_limit_needs_one():
    with pytest.raises(PostgradError, match=r"episode_limit: trajectories .*no limit of its own"):
        made(episode_limit=None)


def test_a_preference_that_is_no_probability_is_named_before_the_run(tmp_path):
    def prefer(first):
        return [-1.0] * len(first)

    with pytest.raises(PostgradError, match=r"'prefer' returned -1 for pair 1"):
        train("spo-self-play-control", preference=prefer, **SMALL, output=str(tmp_path / "run"))
