"""Every public loss, advantage and estimator on ragged batches: finite, or a clear error."""

import math
import os
import traceback
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import postgrad
import strategies
from postgrad.advantages.beta_normalised import BetaFit

FUNCTIONS = strategies.public()
SOURCE = Path(postgrad.__file__).parent
# ten times as many: POSTGRAD_FUZZ=10
MORE = int(os.environ.get("POSTGRAD_FUZZ", "1"))
REFUSED = object()
RUBBISH = (math.nan, math.inf, -math.inf, 1e30, 7.0)

# Where NaN has a meaning of its own, or these say which tokens keep their gradient, or
# how often; the loss beside them is NaN itself.
BESIDE_A_LOSS = {
    "advantages.history.history_length_reward",  # NaN is its word for no history
    "objectives.estimator.one_side",
    "objectives.estimator.two_side",
    "objectives.estimator.ring",
    "objectives.estimator.clip_bounds",
    "objectives.policy_gradient.clip_fractions",
    "objectives.discriminative.odd_values",  # words
}
INFINITE = {"advantages.beta_normalised.normalised_variance"}  # at parameters that it names

every = pytest.mark.parametrize("place", FUNCTIONS)


def over_cases(place, check):
    """`check` of many calls, the same ones in every run; says how often it returned what."""
    found = Counter()

    @settings(
        max_examples=25 * max(MORE, 1),
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.generate] if MORE == 0 else list(Phase),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.cases(place, FUNCTIONS[place]))
    def run(case):
        found[check(FUNCTIONS[place], case)] += 1

    run()
    return found


def numbers(result):
    """All floating-point values in what a function returned, as tensors."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, float):
        return [torch.tensor(result)]
    if isinstance(result, dict):
        return numbers(list(result.values()))
    if isinstance(result, list | tuple):
        return [value for item in result for value in numbers(item)]
    if isinstance(result, BetaFit):  # says itself that a and b are NaN where there is no fit
        result = replace(result, a=0.0, b=0.0)
    if is_dataclass(result):
        return numbers([getattr(result, field.name) for field in fields(result)])
    return []


def same(one, other):
    """Whether two calls had the same outcome, to the bit."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, 0, 0, equal_nan=True)
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


def outcome(function, arguments):
    """What a call returns, and the gradient of each float argument; else REFUSED, and why."""
    given_gradients = {
        name: value.clone().requires_grad_(value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    try:
        result = strategies.call(function, given_gradients)
        if callable(result):
            result = result(given_gradients.setdefault("h", torch.zeros(2, requires_grad=True)))
        values = [value for value in numbers(result) if value.requires_grad]
        if values:
            sum(value.sum() for value in values).backward()
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(last).is_relative_to(SOURCE) or len(str(error).split()) < 4:
            raise AssertionError(f"no clear error: {error!r}") from error
        return REFUSED, str(error)
    gradients = {
        name: value.grad
        for name, value in given_gradients.items()
        if isinstance(value, Tensor) and value.grad is not None
    }
    return result, gradients


def filled(arguments, counts, rubbish):
    """The arguments with rubbish at every place that does not count."""
    return {
        name: torch.where(counts[name], value, rubbish) if name in counts else value
        for name, value in arguments.items()
    }


@every
def test_finite_batches_give_finite_values_and_gradients_or_a_clear_error(place):
    def check(function, case):
        result, gradients = outcome(function, case.arguments)
        if result is REFUSED:
            return "refused"
        for value in numbers(result):
            good = ~value.isnan() if place in INFINITE else value.isfinite()
            assert bool(good.all()), value
        for name, gradient in gradients.items():
            assert bool(gradient.isfinite().all()), f"gradient of {name}: {gradient}"
        return "taken"

    assert over_cases(place, check)["taken"], "every batch was refused: nothing was tested"


MASKED = [
    place
    for place, function in FUNCTIONS.items()
    if set(strategies.MASKS) & set(function.__code__.co_varnames)
    or any(key.startswith(f"{place}.") for key in strategies._COUNTED_BY)
    or place.startswith("advantages.turns.")
]


@pytest.mark.parametrize("place", MASKED)
def test_what_stands_at_masked_places_changes_nothing(place):
    def check(function, case):
        clean = outcome(function, filled(case.arguments, case.counts, 0.5))
        for rubbish in RUBBISH:
            spoilt = outcome(function, filled(case.arguments, case.counts, rubbish))
            assert same(spoilt, clean), (rubbish, spoilt, clean)
        if clean[0] is REFUSED:
            return "refused"
        for name, there in case.counts.items():
            if name in clean[1]:
                assert not bool(clean[1][name][~there].any()), f"a gradient at padding of {name}"
        return "taken"

    over_cases(place, check)


def matters(function, arguments, name, place):
    """Whether the result depends on one value of an argument at all."""
    found = []
    for other in (-1e3, -1.0, 0.0, 0.5, 1.0, 1e3):
        changed = arguments[name].clone()
        changed[place] = other
        result, _ = outcome(function, {**arguments, name: changed})
        if result is not REFUSED:
            found.append(result)
    return any(not same(result, found[0]) for result in found[1:])


@pytest.mark.parametrize("place", [place for place in FUNCTIONS if place not in BESIDE_A_LOSS])
def test_nan_at_a_place_that_counts_is_refused_or_seen_in_the_result(place):
    def check(function, case):
        for name, value in case.arguments.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            there = case.counts.get(name, torch.ones_like(value, dtype=torch.bool))
            if not bool(there.any()):
                continue
            spoilt = value.clone()
            first = tuple(there.nonzero()[0].tolist())
            if outcome(function, case.arguments)[0] is REFUSED:
                return "refused"
            spoilt[first] = math.nan
            result, _ = outcome(function, {**case.arguments, name: spoilt})
            if result is REFUSED:
                continue
            seen = any(not bool(found.isfinite().all()) for found in numbers(result))
            assert seen or not matters(function, case.arguments, name, first), (
                f"NaN in {name} {list(value.shape)} vanished: {result}"
            )
        return "taken"

    over_cases(place, check)
