"""RPO's claim: where the preferences say nothing, DPO runs into a bad arm; RPO stays away."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import TOKENS, preferences, reference_policy, trained
from postgrad.objectives.pairwise import logistic, negative_likelihood, rpo
from postgrad.seeding import generator

METRIC = "true reward"
BETA, ETA, TUNED_BETA = 0.1, 1.0, 1.0
OFFICIAL_ETA = 0.005
PAIRS = 200
ETAS = (0.0, 0.005, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)
BETAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)
STEPS = 200
OFFICIAL = "RPO, cumulative, eta 0.005"
TUNED = "DPO, beta tuned"

# of the margin Delta and the chosen response's log-probability, `[B]` each
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "RPO": lambda delta, won: rpo(BETA * delta, won, ETA * BETA),
    "DPO": lambda delta, won: logistic(BETA * delta),
    OFFICIAL: lambda delta, won: rpo(BETA * delta, won, OFFICIAL_ETA * BETA),
    TUNED: lambda delta, won: logistic(TUNED_BETA * delta),
    "Preferred-FT": lambda delta, won: negative_likelihood(won),
}
# the same methods on a language model
RATE = 1e-4
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "RPO": ("rpo", {"beta": BETA, "coef": 0.2, "learning_rate": RATE}),
    "DPO": ("dpo", {"beta": BETA, "learning_rate": RATE}),
    OFFICIAL: (
        "rpo",
        {"beta": BETA, "variant": "cumulative", "eta": OFFICIAL_ETA, "learning_rate": RATE},
    ),
    TUNED: ("dpo", {"beta": 0.5, "learning_rate": RATE}),
    "Preferred-FT": ("sft", {"learning_rate": 3 * RATE}),
}


class ThreeArms:
    """Three arms of which the data compare two; the third looks like the better one but is bad.

    pi_theta is pi_ref exp(theta features) / Z with one number theta.
    """

    features = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    log_reference = torch.tensor([0.49, 0.49, 0.02], dtype=torch.float64).log()
    reward = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    wins = float(torch.sigmoid(reward[0] - reward[1]))  # P(first arm over second)

    def fitted(self, loss: Loss, wins: float) -> Tensor:
        """log pi `[3]` at the least mean loss when the first arm won a share `wins`, on a grid."""
        theta = torch.linspace(-60, 60, 120_001, dtype=torch.float64)[:, None]
        log_policy = (self.log_reference + theta * self.features).log_softmax(-1)
        ratio = log_policy - self.log_reference
        delta = ratio[:, 0] - ratio[:, 1]
        first, second = loss(delta, log_policy[:, 0]), loss(-delta, log_policy[:, 1])
        return log_policy[(wins * first + (1 - wins) * second).argmin()]

    def true_reward(self, log_policy: Tensor) -> float:
        return float(log_policy.exp() @ self.reward)

    def divergence(self, log_policy: Tensor) -> float:
        return float(log_policy.exp() @ (log_policy - self.log_reference))


def run(arm: str, seed: int, quick: bool) -> Outcome:
    exact = on_three_arms(arm, seed)
    policy = reference_policy(seed, *([5] if quick else []))
    slug, settings = METHODS[arm]
    found = trained(
        slug,
        {"max_response_tokens": TOKENS, **settings},
        policy,
        {"data": preferences(policy, seed)},
        seed,
        steps=10 if quick else STEPS,
        every=5 if quick else 25,
        samples=30 if quick else 300,
    )
    return Outcome(
        exact.values | {f"opinions: {name}": value for name, value in found.values.items()},
        exact.curves | {f"opinions: {name}": curve for name, curve in found.curves.items()},
    )


def on_three_arms(arm: str, seed: int) -> Outcome:
    """The deciding number, after a fit to drawn labels, and exact ones of infinite data."""
    world, loss = ThreeArms(), LOSSES[arm]
    chance = torch.rand(PAIRS, generator=generator(seed, "three arms"))
    drawn = world.fitted(loss, float((chance < world.wins).double().mean()))
    infinite = world.fitted(loss, world.wins)
    values = {
        METRIC: world.true_reward(drawn),
        "true reward on infinite data": world.true_reward(infinite),
        "KL on infinite data": world.divergence(infinite),
        "probability of the unseen arm": float(infinite[2].exp()),
    }

    def over(
        numbers: tuple[float, ...], make: Callable[[float], Loss]
    ) -> list[tuple[float, float]]:
        policies = [world.fitted(make(number), world.wins) for number in numbers]
        return [
            (number, world.true_reward(policy))
            for number, policy in zip(numbers, policies, strict=True)
        ]

    curves = {}
    if arm == "RPO":
        curves["true reward over eta"] = over(
            ETAS, lambda eta: lambda delta, won: rpo(BETA * delta, won, eta * BETA)
        )
        curves["true reward over beta"] = over(
            BETAS, lambda beta: lambda delta, won: rpo(beta * delta, won, ETA * beta)
        )
    if arm == "DPO":
        curves["true reward over beta"] = over(
            BETAS, lambda beta: lambda delta, won: logistic(beta * delta)
        )
    return Outcome(values, curves)


CLAIM = Claim(
    slug="rpo",
    statement="On preferences that leave a bad arm out, DPO puts nearly all its mass on that arm; "
    "RPO, which adds the likelihood of the chosen arm to DPO's loss, keeps away from it.",
    task="three arms of features 0.5, 0 and 1, reference 0.49, 0.49 and 0.02, true reward 1, 0 and "
    "-1; one parameter, beta 0.1; 200 Bradley-Terry labels that compare the first two arms alone",
    metric=METRIC,
    higher_is_better=True,
    method="RPO",
    baseline="DPO",
    arms=tuple(LOSSES),
    run=run,
    notes="eta = 1 was fixed beforehand, not tuned; any eta from 0.7 to 4 "
    "does as well, the official 0.005 (an arm) changes nothing here. DPO's failure is one of "
    "beta = 0.1, which RPO shares. Where beta may be tuned by the true reward, DPO does as "
    "well: with 1, the best of ten (an arm), and worse the further beta is from it, while RPO "
    "hardly depends on it (`true reward over beta`). Preferred-FT, the limit of a large eta, "
    "is nearly as good too. The values called opinions are those of the set-up of DPO's claim "
    "(a tiny language model, 300 pairs) in 200 steps, twice as many, with RPO's average "
    "variant. Tried on seed 100, which is not reported: learning rates 1e-4 and 3e-4 for DPO "
    "with beta 0.1 and 0.5 and for RPO, coef 0.2 and 1 at 1e-4; the other arms once. There "
    "DPO's reward rose to 1.9 and fell to 1.7 at 1e-4, and at 3e-4 rose to 2.2 and fell to "
    "0.4 as its texts went to pieces (with beta 0.5: 1.9 and 1.4 at the end). RPO's was 2.1 "
    "at the end of both, with a fifth of DPO's KL at 1e-4. All arms have 1e-4, which was "
    "better for DPO (Preferred-FT: 3e-4, from DPO's claim). Stopped early, DPO reaches about "
    "as much.",
)
