"""Training in environments, collecting and learning, against Stable-Baselines3's PPO.

CartPole-v1 and Pendulum-v1, played 1 and 8 at once, 2048 steps an iteration, networks of 64 and 64
units with tanh; steps a second over whole iterations. SB3 keeps its defaults: 10 passes in
minibatches of 64. Our `mdpo` keeps its own: full-batch steps of the policy, which are less work,
as its paper has it. Our `ppo` with the settings of SB3 is the comparison at equal work; it steps
policy and value in turn, each with an optimiser of its own, where SB3 has one for both.
"""

from typing import Any

from benchmarks.harness import PEERS, Contender, race
from benchmarks.rows import Row, Setting, compared
from benchmarks.turns import Turns

ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1")
COUNTS = (1, 8)
STEPS = 2048  # of one iteration, over all environments
ITERATIONS = 4  # of one turn
REACH = 1.5
SETTINGS_OF_SB3 = {
    "m": 10,
    "policy_minibatch": 64,
    "value_epochs": 10,
    "value_minibatch": 64,
    "value_clip": None,
    "normalise_observations": False,
    "normalise_rewards": False,
}


def ours(
    turns: Turns, *, method: str, environment: str, count: int, settings: dict[str, Any]
) -> None:
    from postgrad.api import prepare
    from postgrad.training.optimise import Optimisers

    turns.imported()
    learner, loop = prepare(
        method,
        environment=environment,
        environments=count,
        steps_per_iteration=STEPS,
        hidden=[64, 64],
        steps=ITERATIONS * turns.count,
        device="cpu",
        **settings,
    )
    optimise = Optimisers(learner.modules(), loop, learner.place.device)
    step = 0
    while turns.begin():
        for _ in range(ITERATIONS):
            optimise.set_step(step)
            learner.update(learner.collect(step), optimise)
            step += 1
        turns.end(steps=ITERATIONS * STEPS)


def sb3(turns: Turns, *, environment: str, count: int) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    turns.imported()
    learner = PPO(
        "MlpPolicy",
        make_vec_env(environment, n_envs=count, seed=0),
        n_steps=STEPS // count,
        policy_kwargs={"net_arch": [64, 64]},
        device="cpu",
        seed=0,
    )
    while turns.begin():
        learner.learn(ITERATIONS * STEPS, reset_num_timesteps=False)
        turns.end(steps=ITERATIONS * STEPS)


def measure(setting: Setting) -> list[Row]:
    rows = []
    for environment in ENVIRONMENTS:
        for count in COUNTS:
            task = {"environment": environment, "count": count}
            outcomes = race(
                [
                    Contender("mdpo", ours, arguments=task | {"method": "mdpo", "settings": {}}),
                    Contender(
                        "ppo", ours, arguments=task | {"method": "ppo", "settings": SETTINGS_OF_SB3}
                    ),
                    Contender("SB3 PPO", sb3, PEERS, task),
                ],
                setting.repeats,
            )
            where = f"{environment}, {count} at once"
            rows += [
                compared(
                    f"mdpo, {where}", "SB3 PPO", outcomes, ours="mdpo", rate="steps", reach=REACH
                ),
                compared(
                    f"ppo with SB3's settings, {where}",
                    "SB3 PPO",
                    outcomes,
                    ours="ppo",
                    rate="steps",
                ),
            ]
    return rows
