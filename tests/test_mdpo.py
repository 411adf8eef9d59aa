"""MDPO (both forms) and PPO: their mathematics as methods, learning, resuming, and faults."""

import json
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from postgrad.api import resume, train
from postgrad.batch import Batch
from postgrad.catalogue import method_class
from postgrad.config import parse_overrides, resolve
from postgrad.errors import PostgradError
from postgrad.evaluation.control import evaluate_saved_policy
from postgrad.inspection import evaluate
from postgrad.methods.base import Method, Place
from postgrad.models.distributions import SquashedGaussian
from postgrad.training.optimise import Optimisers

SMALL = {
    "steps_per_iteration": 128,
    "environments": 4,
    "hidden": [16],
    "evaluation_episodes": 2,
    "log": [],
    "report": False,
}
OFF = {
    "form": "off-policy",
    "environment": "Pendulum-v1",
    "off_policy": {
        "steps_per_iteration": 20,
        "m": 30,
        "batch_size": 16,
        "warm_start": 40,
        "hidden": [16],
    },
}


def build(slug: str = "mdpo", steps: int = 4, **settings) -> tuple[Method, Optimisers]:
    """A method and its optimisers, without a run folder."""
    kind = method_class(slug)
    loop, own = resolve(kind.Config, kind.recipe, {**SMALL, "steps": steps}, settings)
    method = kind(own, Place(seed=3, steps=steps))
    return method, Optimisers(method.modules(), loop, torch.device("cpu"))


def gradient(loss: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


class Side(gymnasium.Env):
    """One step an episode: reward for an action on the side that the observation shows."""

    def __init__(self, continuous=False, reward=None):
        self.observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = (
            gymnasium.spaces.Box(-1, 1, (1,), np.float32)
            if continuous
            else gymnasium.spaces.Discrete(2)
        )
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.side = float(self.np_random.choice([-1.0, 1.0]))
        return np.float32([self.side]), {}

    def step(self, action):
        if self.reward is not None:
            return np.float32([self.side]), self.reward, True, False, {}
        if isinstance(self.action_space, gymnasium.spaces.Discrete):
            good = float((action == 1) == (self.side > 0))
        else:
            good = -float((action[0] - 0.5 * self.side) ** 2)
        return np.float32([self.side]), good, True, False, {}


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
def test_the_first_step_is_the_plain_policy_gradient(environment):
    method, _ = build(environment=environment)
    learner = method.learner
    batch = method.collect(0)
    loss, metrics = method.loss(batch)
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)
    logprobs = learner.policy.distribution(batch.observations).logprobs(batch.actions)
    torch.testing.assert_close(logprobs.detach(), batch.old_logprobs)
    plain = gradient(-(logprobs * batch.advantages).mean(), learner.policy)
    torch.testing.assert_close(gradient(loss, learner.policy), plain, rtol=1e-4, atol=1e-6)


def test_later_steps_weigh_the_kl_by_the_step_size():
    method, optimise = build(step_size=0.25, entropy_bonus=0.1)
    batch = method.collect(0)
    for _ in range(3):
        optimise(method.loss, batch, "policy")
    loss, metrics = method.loss(batch)
    new = method.learner.policy.distribution(batch.observations)
    ratio = (new.logprobs(batch.actions) - batch.old_logprobs).exp()
    expected = -(ratio * batch.advantages).mean() + 4 * metrics["kl"] - 0.1 * metrics["entropy"]
    assert metrics["kl"] > 0
    torch.testing.assert_close(loss, expected)


def test_the_step_size_falls_from_one_to_the_floor():
    method, _ = build(steps=4)
    sizes = []
    for method.learner.iteration in range(5):
        sizes.append(method.learner.step_size)
    assert sizes == [1.0, 0.75, 0.5, 0.25, 0.25]


def test_m_counts_the_policys_steps_and_minibatches_the_values():
    method, optimise = build(m=3, value_epochs=2, value_minibatch=32)
    batch = method.collect(0)
    counted = []

    def counting(loss, part, module):
        counted.append((module, len(part)))
        return optimise(loss, part, module)

    method.update(batch, counting)
    assert counted == [("policy", 128)] * 3 + [("value", 32)] * 8


def test_with_m_of_one_the_step_size_makes_no_difference():
    policies = []
    for step_size in (1.0, 0.1):
        method, optimise = build(m=1, step_size=step_size)
        method.update(method.collect(0), optimise)
        policies.append(method.learner.policy)
    for a, b in zip(*(policy.parameters() for policy in policies), strict=True):
        # to a thousandth of the learning rate
        torch.testing.assert_close(a, b, rtol=0, atol=3e-7)


def test_moments_stand_still_while_a_policy_collects_and_learns():
    method, optimise = build()
    learner = method.learner
    batch = method.collect(0)
    primed = learner.policy.standardise.shift.clone()
    assert primed.abs().max() > 0
    for part in learner._passes(batch, 2, None, "policy"):
        optimise(method.loss, part, "policy")
    assert torch.equal(learner.policy.standardise.shift, primed)
    method.update(batch, optimise)
    assert not torch.equal(learner.policy.standardise.shift, primed)
    assert learner.environments.steps == 2 * 128


def test_a_cut_episode_is_valued_by_where_it_got_to():
    method, _ = build(
        environment="Pendulum-v1",
        episode_limit=8,
        normalise_rewards=False,
        gae_lambda=0.0,
        steps_per_iteration=32,
        environments=2,
    )
    batch = method.collect(0)
    cut = (batch.episode_lengths == 8).nonzero()[:, 0]
    assert len(cut) == 4
    # with lambda = 0 the return is r + gamma V(s'): never the bare reward, for nothing terminates
    following = (batch.returns - batch.rewards) / 0.99
    assert following[cut].abs().min() > 1e-4
    inside = torch.tensor([i for i in range(28) if i not in cut])
    torch.testing.assert_close(
        following[inside], batch.old_values[inside + 2], rtol=1e-3, atol=1e-4
    )


def off_policy_batch(learner) -> Batch:
    draws = torch.Generator().manual_seed(0)
    drawn = learner.replay.draw(16, draws)
    return Batch(**drawn, noise=learner.policy.noise(16, generator=draws))


def test_off_policy_with_c_equal_to_lambda_forgets_the_old_policy():
    def difference(step_size: float) -> float:
        off = {**OFF["off_policy"], "step_size": step_size, "entropy_coefficient": 0.2}
        method, _ = build(**{**OFF, "off_policy": off})
        method.collect(0)
        learner, batch = method.learner, off_policy_batch(method.learner)
        gradients = []
        for _ in range(2):
            loss, _metrics = learner.policy_loss(batch)
            gradients.append(gradient(loss, learner.policy))
            with torch.no_grad():
                for parameter in learner.previous.parameters():
                    parameter.add_(0.3)
        return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())

    assert difference(step_size=5.0) < 1e-5
    assert difference(step_size=1.0) > 0.01


def test_off_policy_losses_are_those_of_the_equations():
    method, _ = build(**OFF)
    method.collect(0)
    learner, batch = method.learner, off_policy_batch(method.learner)
    with torch.no_grad():
        policy = SquashedGaussian(learner.policy(batch.observations))
        before = policy.sample_before(batch.noise)
        action, logprob = before.tanh(), policy.log_density(before).sum(1)
        old = SquashedGaussian(learner.previous(batch.observations)).log_density(before).sum(1)
        q = learner.critics.q_values(batch.observations, action)
        mean, log_std = policy.parameters.chunk(2, -1)
        size = 1e-3 * (mean.square().mean() + log_std.square().mean())
        expected = (logprob + (0.2 - 1) * old - q[0]).mean() + size
        y = batch.rewards + 0.99 * learner.target(batch.next_observations)[:, 0]
        errors = learner.critics.q_values(batch.observations, batch.actions) - y
        v = learner.critics(batch.observations) - (q.min(0).values - 0.2 * logprob)
        critics = 0.5 * (errors.square().mean(1).sum() + v.square().mean())
    torch.testing.assert_close(learner.policy_loss(batch)[0], expected)
    torch.testing.assert_close(learner.critic_loss(batch)[0], critics)


def test_off_policy_refreshes_the_old_policy_every_m_gradient_steps():
    method, optimise = build(**OFF)
    learner = method.learner

    def same() -> bool:
        pairs = zip(learner.policy.parameters(), learner.previous.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    seen = []
    for step in range(5):
        metrics = method.update(method.collect(step), optimise)
        seen.append((learner.gradient_steps, bool(metrics), same()))
    # two blocks fill the warm start, of which the second already learns; m = 30
    assert seen == [(0, False, True), (20, True, False), (40, True, False), (60, True, True),
                    (80, True, False)]  # fmt: skip
    assert all(p.requires_grad for p in learner.critics.parameters())
    assert not any(p.requires_grad for p in learner.target.parameters())


CASES = {
    "mdpo": ("mdpo", {}),
    "mdpo, continuous": ("mdpo", {"environment": "Pendulum-v1"}),
    "mdpo, off-policy": ("mdpo", OFF),
    "ppo": ("ppo", {}),
}


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))}
        for row in found
    ]


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_continues_exactly(case, tmp_path):
    slug, settings = CASES[case]
    whole = train(
        slug, **{**SMALL, **settings}, steps=4, save_every=2, output=str(tmp_path / "whole"), seed=1
    )
    # what a kill during step 3 leaves: the checkpoint of step 2, and rows beyond it
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    resumed = resume(tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    for name, module in whole.method.modules().items():
        other = resumed.method.modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), (name, key)


@pytest.mark.parametrize("case", CASES)
def test_the_saved_policy_is_the_one_that_was_evaluated(case, tmp_path):
    slug, settings = CASES[case]
    run = train(slug, **{**SMALL, **settings}, steps=2, output=str(tmp_path / "run"))
    assert evaluate_saved_policy(tmp_path / "run" / "model", episodes=2) == run.evaluation
    assert evaluate(str(tmp_path / "run"), None, 1) == run.evaluation
    assert evaluate(str(tmp_path / "run" / "model"), None, 1)["episode_length"] > 0
    with pytest.raises(PostgradError, match="has 6 observations and 3 actions, the policy learned"):
        evaluate(str(tmp_path / "run"), "Acrobot-v1", 1)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert {"observation", "action", "reward"} <= samples[0].keys()


@pytest.mark.parametrize("slug", ["mdpo", "ppo"])
def test_on_policy_methods_learn_which_side_to_choose(slug, tmp_path):
    run = train(
        slug,
        environment=Side,
        **{**SMALL, "evaluation_episodes": 20},
        steps=12,
        learning_rate=3e-3,
        output=str(tmp_path / "run"),
    )
    returns = [row["return"] for row in rows(tmp_path / "run") if "return" in row]
    assert returns[0] < 0.7
    assert returns[-1] > 0.9
    assert run.evaluation["return"] == 1.0


def test_off_policy_mdpo_learns_where_to_go(tmp_path):
    off = {**OFF["off_policy"], "batch_size": 64, "hidden": [32], "entropy_coefficient": 0.01}
    run = train(
        "mdpo",
        environment=lambda: Side(continuous=True),
        **{**SMALL, "evaluation_episodes": 20},
        form="off",
        off_policy={**off, "step_size": 20.0},
        steps=20,
        learning_rate=3e-3,
        output=str(tmp_path / "run"),
    )
    # the best action has return 0, the middle -0.25, a random one -0.58
    assert run.evaluation["return"] > -0.02


@pytest.mark.parametrize(
    ("written", "form"),
    [("on", "on-policy"), ("off", "off-policy"), ("off-policy", "off-policy")],
)
def test_the_form_may_be_written_short(written, form):
    settings = parse_overrides([f"form={written}"])
    assert resolve(method_class("mdpo").Config, {}, settings)[1].form == form


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": "CartPol-v1"}, "unknown environment 'CartPol-v1'.*CartPole"),
        ({"form": "off"}, "CartPole-v1 has 2 discrete actions: choose form=on"),
        ({"form": "sideways"}, "form: "),
        ({"environments": 3}, "steps_per_iteration: 128 cannot be shared"),
        ({"m": 0}, "m: "),
        ({"step_size": 0}, "step_size: "),
        ({"entropy_bonuss": 0.1}, "unknown key 'entropy_bonuss'.*'entropy_bonus'"),
        ({**OFF, "off_policy": {"replay": 10}}, "off_policy.replay: 10 is less than"),
    ],
)
def test_faults_are_said_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(PostgradError, match=message):
        train("mdpo", **{**SMALL, **settings}, steps=1, output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(PostgradError, match="step 1: reward is nan; saved to"):
        train(
            "mdpo",
            environment=lambda: Side(reward=float("nan")),
            **SMALL,
            steps=2,
            output=str(tmp_path / "run"),
        )
