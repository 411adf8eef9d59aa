"""Regularized Preference Optimization."""

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.pairwise import logistic, negative_likelihood, rpo

_KEYS = {"average": "coef", "cumulative": "eta"}


class RPOSettings(PreferenceSettings):
    """RPO's settings."""

    beta: float = setting(
        0.5,
        "strength of the KL to the reference; the official cumulative recipes take 0.01 to 0.05",
        gt=0,
        source="official script of the average variant",
    )
    variant: Literal["average", "cumulative"] = setting(
        "average",
        "NLL of the chosen response: its mean over tokens, or the paper's sum",
        source="official code, which recommends the average",
    )
    coef: float | None = setting(
        None,
        "weight of the average NLL; 0.2 when empty",
        ge=0,
        source="official script of the average variant",
    )
    eta: float | None = setting(
        None,
        "the cumulative NLL weighs eta * beta; 0.005 when empty",
        ge=0,
        source="official recipes of the cumulative variant",
    )

    @model_validator(mode="after")
    def _weight_of_the_variant(self) -> Self:
        for variant, key in _KEYS.items():
            if variant != self.variant and getattr(self, key) is not None:
                raise ValueError(
                    f"{key}: belongs to variant={variant}; with variant={self.variant} expected "
                    f"{_KEYS[self.variant]}, got {key}={getattr(self, key):g}"
                )
        return self

    @property
    def weight(self) -> float:
        """What the NLL is multiplied by."""
        if self.variant == "average":
            return 0.2 if self.coef is None else self.coef
        return self.beta * (0.005 if self.eta is None else self.eta)


class RPO(PreferenceMethod):
    """Regularized Preference Optimization (Liu et al. 2024, arXiv:2405.16436).

    A reward estimated from few preferences is wrong where there are no data, and its maximiser goes
    there (overoptimisation). Choosing the policy that is best for the worst reward that still fits
    the data avoids that. This max-min problem collapses to DPO plus an SFT term on a baseline
    policy, here that of the chosen responses:

        L = -log sigma(beta Delta) - eta beta log pi(y_w)              (cumulative: the paper's)
        L = -log sigma(beta Delta) - coef log pi(y_w) / |y_w|          (average: its appendix F)

    So the likelihood of the chosen response cannot be given up for the margin. The two agree when
    all chosen responses have T tokens and coef = eta beta T; the authors find the average better
    for reasoning and the sum for chat. The loss is not comparable with DPO's: `loss/preference` and
    `loss/nll` are reported apart. The SFT term imitates bad chosen responses too.
    """

    Config = RPOSettings
    recipe = {**PreferenceMethod.recipe, "learning_rate": 5e-7, "schedule": "cosine"}
    config: RPOSettings

    def losses(self, found: Compared) -> Tensor:
        return rpo(
            self.config.beta * found.delta,
            found.logprobs[:, 0],
            self.config.weight,
            self._lengths(found),
        )

    def terms(self, found: Compared) -> dict[str, Tensor]:
        return {
            "preference": logistic(self.config.beta * found.delta),
            "nll": negative_likelihood(found.logprobs[:, 0], self._lengths(found)),
        }

    def _lengths(self, found: Compared) -> Tensor | None:
        return found.lengths[:, 0] if self.config.variant == "average" else None
