"""Ragged batches for every public function of `postgrad.objectives` and `postgrad.advantages`.

What an argument holds follows from its name and annotation: a kind of values and a shape, in which
equal letters are equal sizes. `_EVERYWHERE` has what a name means in all modules, `_MODULES` what
differs in one of them, `*` standing for all its other tensors and `function.name` for one argument.
A function with an argument that neither knows cannot be drawn: `NoStrategy` names it.
"""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

import postgrad.advantages
import postgrad.objectives
from postgrad.advantages.history import HistoryTracker
from postgrad.advantages.maxmin import GroupWeights
from postgrad.advantages.moments import RewardScale, RunningMoments
from postgrad.advantages.pairing import PreferenceQueue
from postgrad.advantages.penalties import AdaptiveCoefficient
from postgrad.advantages.risk import QuantileTracker
from postgrad.advantages.running_means import MovingMean, PartitionFunctions
from postgrad.advantages.value_tracker import BetaValueTracker
from postgrad.objectives.divergence import DIVERGENCES, FDivergence
from postgrad.objectives.mixture import linear_reward
from postgrad.objectives.pairwise import hinge, logistic
from postgrad.objectives.projection import LogitTransform
from postgrad.objectives.robust_contrastive import PerSampleState, RobustSettings


class NoStrategy(AssertionError):
    """A public function has an argument of which nobody has said what it holds."""


# Which functions there are --------------------------------------------------------------------


def public() -> dict[str, Callable[..., Any]]:
    """Every public function, and what exercises every estimator, by `room.module.name`."""
    found = {}
    for room in (postgrad.objectives, postgrad.advantages):
        for entry in pkgutil.iter_modules(room.__path__):
            module = importlib.import_module(f"{room.__name__}.{entry.name}")
            place = module.__name__.removeprefix("postgrad.")
            for name, value in vars(module).items():
                if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
                    continue
                if inspect.isfunction(value):
                    found[f"{place}.{name}"] = value
                elif inspect.isclass(value) and not is_dataclass(value):
                    found[f"{place}.{name}"] = ESTIMATORS.get(value, value)
    return found


# What estimators do in a run, as functions of the tensors that they take in -------------------


def _history(lengths: Tensor, correct: Tensor, mode: Literal["min", "mean"]) -> Any:
    tracker = HistoryTracker(mode)
    ids = [str(i % 2) for i in range(len(lengths))]
    tracker.update(ids, lengths, correct)
    return [value for value in tracker.lookup(ids).tolist() if value == value]


def _group_weights(means: Tensor, rate: float) -> Any:
    weights = GroupWeights(len(means), rate)
    weights.update(means)
    weights.update(means)
    return weights.value


def _running_moments(values: Tensor, more: Tensor) -> Any:
    moments = RunningMoments(values.shape[1])
    moments.update(values)
    moments.update(more)
    return moments.mean, moments.variance


def _reward_scale(rewards: Tensor, ends: Tensor, discount: float) -> Any:
    return RewardScale(rewards.shape[1], discount)(rewards, ends)


def _preference_queue(signed: Tensor) -> Any:
    queue = PreferenceQueue(max(len(signed), 1))
    for value in signed:
        queue.push({"value": value})
    return queue.reward({}, lambda one, other: [float(kept["value"]) for kept in other])


def _adaptive_coefficient(value: float, target: float, divergences: Tensor) -> Any:
    coefficient = AdaptiveCoefficient(value, target)
    for divergence in divergences.tolist():
        coefficient.update(divergence)
    return coefficient.value


def _quantile_tracker(samples: Tensor, more: Tensor, rate: float) -> Any:
    tracker = QuantileTracker([0.2, 0.8], rate)
    tracker.update(samples)
    tracker.update(more)
    return tracker.values


def _partition_functions(contexts: Tensor, log_weights: Tensor) -> Any:
    functions = PartitionFunctions(4)
    functions.update(contexts, log_weights)
    functions.update(contexts, log_weights)
    return functions.log(contexts)


def _moving_mean(values: Tensor, window: int) -> Any:
    mean = MovingMean(window)
    mean.update(values)
    return mean.value


def _beta_value_tracker(successes: Tensor, prompts: Tensor, rewards: Tensor, keep: Tensor) -> Any:
    tracker = BetaValueTracker(4)
    tracker.update(prompts, rewards, keep)
    after = tracker.values(), tracker.sizes(prompts)
    tracker.start(successes, samples=8, weight=2.0)
    return after, tracker.values()


def _per_sample_state(index: Tensor, log_g: Tensor, gradient: Tensor) -> Any:
    state = PerSampleState(8, 0.1)
    index = state.check(index)
    log_s = state.averaged(index, log_g, _ROBUST.gamma)
    state.update(index, log_s, gradient, _ROBUST)
    return state.tau, state.u, state.averaged(index, log_g, _ROBUST.gamma)


_ROBUST = RobustSettings(
    rho=0.2, gamma=0.5, beta=0.5, eta=0.1, tau_min=0.01, tau_max=1.0, gradient_limit=3.0
)
ESTIMATORS: dict[type, Callable[..., Any]] = {
    HistoryTracker: _history,
    GroupWeights: _group_weights,
    RunningMoments: _running_moments,
    RewardScale: _reward_scale,
    PreferenceQueue: _preference_queue,
    AdaptiveCoefficient: _adaptive_coefficient,
    QuantileTracker: _quantile_tracker,
    PartitionFunctions: _partition_functions,
    MovingMean: _moving_mean,
    BetaValueTracker: _beta_value_tracker,
    PerSampleState: _per_sample_state,
}


# What arguments hold --------------------------------------------------------------------------

# kind and shape of tensors; either may be left to the module
_EVERYWHERE = {
    **dict.fromkeys(("mask", "inside", "present", "finished"), "bool"),
    **dict.fromkeys(("terminations", "truncations", "ends", "desirable", "demonstrated"), "bool"),
    **dict.fromkeys(("correct", "behaves", "keep", "eligible", "flip", "mine"), "bool"),
    **dict.fromkeys(("logprobs", "old_logprobs", "reference_logprobs", "reference"), "logp"),
    **dict.fromkeys(("logp", "logp_ref", "logp_w", "logp_l", "ref_w", "ref_l", "centre"), "logp"),
    **dict.fromkeys(("log_policy", "log_proposal", "log_target", "before", "now"), "logp"),
    **dict.fromkeys(("wins", "other_wins", "success", "labels", "rates", "probabilities"), "rate"),
    **dict.fromkeys(("std", "scale", "step_length", "tau", "entropy", "entropies", "kl"), "above"),
    **dict.fromkeys(("groups", "contexts", "prompts"), "ids N"),
    "lengths": "count N",
    "ratio": "above",
    "target": "simplex",
}
_TABLES = {"policy": "simplex", "reference": "simplex", "expert": "simplex", "weights": "simplex"}
_MODULES: dict[str, dict[str, str]] = {
    "objectives.advantage_regression": {
        "*": "real B",
        "step_improvement.*": "real BK",
        "regression_minimiser.*": "real BK",
        **_TABLES,
    },
    "objectives.contrastive": {"*": "real Bd", "negatives": "real BMd", "temperature": "above "},
    "objectives.control": {
        "*": "real B",
        "log_x": "logratio",
        "md_closed_form.*": "real BA",
        "policy": "simplex",
        "off_policy_mdpo_loss.logprobs": "logp BA",
        "off_policy_mdpo_loss.old_logprobs": "logp BA",
        "soft_value_target.q_values": "real CB",
    },
    "objectives.discriminative": {
        "*": "real N",
        "sequence_score.*": "logp NT",
        "old_divergence.*": "logp NT",
        "rewards": "right",
    },
    "objectives.divergence": {
        "*": "real N",
        "reverse_kl_surrogate.*": "logp BkT",
        "f_divergence.*": "simplex BK",
        "log_partition": "rate ",
        "log_weights": "logratio",
        "features": "real Cnd",
        "moments": "real d",
    },
    "objectives.mismatch": {
        "trainer": "logp NT",
        "sampler": "logp NT",
        "mask": "bool NT",
    },
    "objectives.estimator": {"*": "real NT", "log_weight": "logratio"},
    "objectives.flow": {
        "*": "real B",
        "x": "real Bd",
        "velocity": "real Bd",
        "x_next": "real Bd",
        "mean": "real Bd",
        "old_mean": "real Bd",
        "reference_mean": "real Bd",
        "time": "rate",
        "next_time": "lower",
        "log_ratio": "logratio",
    },
    "objectives.game": {
        "*": "real K",
        "preferences": "game KK",
        "opponent": "simplex",
        "mu": "simplex",
        "policy": "simplex",
        "p": "simplex",
        "q": "simplex",
        "log_policy": "logsimplex",
        "log_mu": "logsimplex",
        "mask": "bool NT",
        "log_ratio": "real NT",
        "wins": "rate N",
        "delta": "real N",
        "other_wins": "rate N",
    },
    "objectives.gradients": {"*": "real d", "value": "real "},
    "objectives.hybrid": {"*": "real NT", "demonstrated": "bool N"},
    "objectives.information": {
        "*": "logsimplex BV",
        "logp": "logsimplex",
        "logp_ref": "logsimplex",
        "margins_in_order.*": "logp B2",
    },
    "objectives.iterative": {"*": "logp B2", "values": "real", "log_ratio": "real"},
    "objectives.listwise": {"*": "real BK"},
    "objectives.mixture": {
        "*": "real UH",
        "margins": "real UN",
        "users": "users N",
        "em_reward_mixture.margins": "",
        "differences": "real Nd",
        "mine": "bool N",
        "start": "real d",
    },
    "objectives.one_step": {"*": "simplex BK"},
    "objectives.one_token": {"*": "real BV", "targets": "ids B", "candidates": "ids Bk"},
    "objectives.pairwise": {
        "*": "real B",
        "sequence_logprobs.*": "logp NT",
        "copg.*": "real BK",
        "eps": "flips",
        "lengths": "count B",
        "target": "logp",
        "mean_w": "logp",
        "mean_l": "logp",
        "mean_logp": "logp",
    },
    "objectives.policy_gradient": {"*": "real NT"},
    "objectives.projection": {
        "*": "real Nd",
        "weight": "real Vd",
        "bias": "real V",
        "targets": "ids N",
    },
    "objectives.reward_modeling": {
        "*": "real B",
        "preference_strength.scores": "real NM2",
        "sinkhorn_codes.scores": "real BK",
        "view_s": "real Bd",
        "view_t": "real Bd",
        "prototypes": "real Kd",
        "spread_of_rewards.*": "real BK",
        "smoothing": "rate",
        "margin": "real",
    },
    "objectives.robust_contrastive": {
        "*": "real Bd",
        "h": "rate BM",
        "tau": "above B",
        "log_s": "rate B",
        "index": "places B",
        "log_g": "real B",
        "gradient": "real B",
    },
    "objectives.shapes": {"*": "real NT"},
    "objectives.supervised": {
        "*": "real B",
        "f_divergence.*": "simplex BK",
        "logits": "real BTA",
        "actions": "ids BT",
        "values_from_logits.mask": "prefix BT",
        "value": "real ",
    },
    "objectives.trajectory": {"*": "real BK"},
    "objectives.unpaired": {"*": "real N"},
    "advantages.beta_normalised": {"*": "rate N"},
    "advantages.checks": {"*": "real NT"},
    "advantages.conflicts": {
        "*": "bool NT",
        "ids": "ids NT",
        "mask": "prefix NT",
        "advantages": "real N",
        "entropies": "above NT",
        "entropy": "above N",
    },
    "advantages.consistency": {"*": "real N", "gate": "rate"},
    "advantages.data_shaping": {"*": "real N"},
    "advantages.group": {
        "*": "real N",
        "batch_standardised.*": "real NT",
        "mask": "bool NT",
    },
    "advantages.group_contrast": {"*": "real PG", "correct": "right"},
    "advantages.history": {
        "*": "real N",
        "history": "count N",
        "tokens": "ids N",
        "history_length_reward.correct": "bool N",
    },
    "advantages.maxmin": {"*": "real U", "scores": "real UN", "weights": "simplex U"},
    "advantages.moments": {
        "*": "real Nd",
        "more": "real Md",
        "RewardScale.*": "real TB",
    },
    "advantages.pairing": {
        "*": "real K",
        "preferences": "game KK",
        "wins": "rate K",
        "lead": "rate K",
        "win_rate_rewards.signed": "signed KK",
        "PreferenceQueue.signed": "rate K",
        "probabilities": "rate K",
        "reward_pairs.rewards": "real PN",
    },
    "advantages.penalties": {"*": "real N", "divergences": "above N"},
    "advantages.risk": {
        "*": "real N",
        "bundle": "bundle N",
        "low": "real ",
        "high": "above ",
        "shared_out.advantages": "real N",
        "more": "real M",
        "groups": "pairs N",
    },
    "advantages.roll_in": {
        "*": "real N",
        "uniforms": "below N",
        "mask": "bool NT",
        "roll_ins": "ids N",
    },
    "advantages.running_means": {"*": "real N"},
    "advantages.sample_weights": {"*": "real PN"},
    "advantages.selection": {"*": "real N"},
    "advantages.shaping": {"*": "real N"},
    "advantages.steps": {"*": "real N", "counts": "count N", "state": "ids N"},
    "advantages.temporal": {
        "*": "real TB",
        "token_advantages.*": "real NT",
        "egae.*": "real NT",
        "mask": "prefix NT",
        "finished": "all N",
    },
    "advantages.token_rewards": {"*": "real NT"},
    "advantages.turns": {
        "*": "real NK",
        "confidences": "rate",
        "counts": "turns N",
        "outcomes": "real N",
        "turns": "ids NT",
        "inside": "bool NT",
        "position_centred.values": "real NT",
    },
    "advantages.value_tracker": {
        "*": "logp NT",
        "shift": "above N",
        "rewards": "rate N",
        "keep": "rate N",
        "successes": "rate 4",
    },
}
# values of plain numbers that are worth a try; what must not be 0 has to say so
_NUMBERS: dict[str, list[Any]] = {
    **{key: [0.1, 1.0, 2.0, 0.0] for key in ("alpha", "beta")},
    **{key: [0.5, 0, 1] for key in ("share", "quantile", "omega", "against_worst", "coefficient")},
    **{key: [0.9, 0.0, 1.0] for key in ("discount", "lambda_", "gamma", "steepness")},
    "cap": [2.0, 1.0, 0.5],
    **{key: [0.2, 0.0] for key in ("clip_low", "low", "clip", "eps", "bound")},
    **{key: [0.3, 0.0] for key in ("clip_high", "high", "outer_low", "tolerance")},
    "outer_high": [0.6],
    "dual_clip": [3.0],
    **{key: [0.1, 1.0, 0.0] for key in ("tau", "eta", "t", "temperature", "kappa", "rate", "step")},
    **{key: [0.5, 1.0, 2.0, 0.0] for key in ("k", "b", "a", "x", "y", "p", "tsallis_q", "scale")},
    **{key: [0.5, 0.0] for key in ("weight", "weights", "delta", "value", "target")},
    **{key: [0.5, 0.0] for key in ("desirable_weight", "undesirable_weight", "rho", "decay")},
    **{key: [0.7, 0.0] for key in ("threshold", "initial", "least", "lead", "least_gap")},
    **{key: [0.5, 0.0] for key in ("noise_level", "entropy_coefficient", "sharpness")},
    **{key: [0.3, 0.0] for key in ("log_partition", "smoothing", "margin", "divergence")},
    **{key: [5.0, 0.0] for key in ("reference", "half_life", "limit", "constant")},
    **{key: [1, 2, 3, 0] for key in ("steps", "samples", "count", "size", "items", "tokens", "n")},
    **{key: [2, 0] for key in ("prompts", "longest", "rollout_tokens", "demonstration_tokens")},
    **{
        key: [1, 2, 0] for key in ("iterations", "number", "rounds", "restarts", "groups", "window")
    },
    "floor": [-0.5, -0.7],
    "penalty": [-1.0, 0.0],
    "lowest": [1e-4],
    "highest": [1e4],
    "high_share": [0.9],
}
_NUMBERS_OF: dict[str, list[Any]] = {
    "objectives.game.nash_policy.tau": [0.5, 1.0],
    "objectives.game.nash_policy.tolerance": [1e-4],
    "objectives.discriminative.hinge_coefficient.divergence": [-1.0, 0.3],
    "objectives.mixture.user_likelihoods.count": [1, 2],
    "objectives.divergence.fit_moments.iterations": [20],
    "advantages.value_tracker.kept_share.low": [0.875],
    "advantages.value_tracker.kept_share.high": [0.96],
    "advantages.beta_normalised.beta_weights.alpha": [1.0, 1.5, 40.0],
    "advantages.beta_normalised.beta_weights.beta": [1.0, 1.5, 40.0],
    "advantages.penalties.AdaptiveCoefficient.value": [0.1],
}
_OBJECTS: dict[Any, st.SearchStrategy[Any]] = {
    FDivergence: st.sampled_from(list(DIVERGENCES.values())),
    LogitTransform: st.sampled_from([LogitTransform(), LogitTransform(0.5, 3.0)]),
    RobustSettings: st.sampled_from([_ROBUST]),
    PerSampleState: st.builds(lambda: PerSampleState(8, 0.1)),
    Generator: st.integers(0, 9).map(lambda seed: Generator().manual_seed(seed)),
}


# How arguments are drawn ----------------------------------------------------------------------

# by the mask or lengths of a function: its tensors of which other places do not count
MASKS = ("mask", "present", "inside")


@dataclass
class Case:
    """One call: its arguments, and where each tensor's values count (None: everywhere)."""

    arguments: dict[str, Any]
    counts: dict[str, Tensor]


def cases(place: str, function: Callable[..., Any]) -> st.SearchStrategy[Case]:
    """Calls of a public function, found under `place`, with batches of all kinds."""
    if inspect.isclass(function):
        raise NoStrategy(f"{place}: say in tests/strategies.py what this estimator takes in")
    hints = typing.get_type_hints(function)
    names = list(inspect.signature(function).parameters)

    @st.composite
    def drawn(draw: st.DrawFn) -> Case:
        sizes: dict[str, int] = {}
        random = Generator().manual_seed(draw(st.integers(0, 2**20)))
        arguments = {}
        for name in names:
            arguments[name] = _argument(draw, place, name, hints[name], sizes, random)
        return Case(arguments, _counting(place, arguments))

    return drawn()


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The function of its arguments; `**tensors` are spread."""
    spread: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            spread[f"some_{name}"] = arguments[name]
        else:
            spread[name] = arguments[name]
    return function(**spread)


def _argument(
    draw: st.DrawFn, place: str, name: str, hint: Any, sizes: dict[str, int], random: Generator
) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if type(None) in options:
        options = tuple(option for option in options if option is not type(None))
        if draw(st.booleans()):
            return None
    if Tensor in options:
        return _tensor(draw, place, name, sizes, random)
    option = options[0]
    origin = typing.get_origin(option)
    if f"{place}.{name}" in _SPECIAL:
        return _SPECIAL[f"{place}.{name}"](draw, sizes, random)
    if origin is Literal:
        return draw(st.sampled_from(typing.get_args(option)))
    if option is bool:
        return draw(st.booleans())
    if option in _OBJECTS:
        return draw(_OBJECTS[option])
    known = _NUMBERS_OF.get(f"{place}.{name}") or _NUMBERS.get(name)
    if option in (int, float) and known:
        return draw(st.sampled_from([option(value) for value in known]))
    raise NoStrategy(f"{place}: say in tests/strategies.py what its argument {name!r} holds")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _tensor(
    draw: st.DrawFn, place: str, name: str, sizes: dict[str, int], random: Generator
) -> Tensor:
    kind, shape = _kind_and_shape(place, name)
    where = [int(letter) if letter.isdigit() else _size(draw, letter, sizes) for letter in shape]
    return _KINDS[kind](draw, where, random)


def _kind_and_shape(place: str, name: str) -> tuple[str, str]:
    room, function = place.rsplit(".", 1)
    module = _MODULES.get(room)
    if module is None:
        raise NoStrategy(f"{place}: say in tests/strategies.py what its argument {name!r} holds")
    keys = (f"{function}.{name}", name)
    found = [module[key] for key in keys if key in module]
    found += [_EVERYWHERE[name]] if name in _EVERYWHERE else []
    found += [module[key] for key in (f"{function}.*", "*") if key in module]
    kinds = [words.partition(" ")[0] for words in found]
    shapes = [words.partition(" ")[2] for words in found if " " in words]
    return kinds[0], shapes[0]


def _size(draw: st.DrawFn, letter: str, sizes: dict[str, int]) -> int:
    if letter not in sizes:
        sizes[letter] = draw(st.sampled_from(_SIZES.get(letter, [2, 1, 3, 4, 0])))
    return sizes[letter]


# widths of tables and vocabularies are never 0
_SIZES = {"V": [4], "A": [4], "d": [3, 1], "M": [2, 1, 3], "K": [2, 3, 4, 1], "U": [2, 1, 3]}


def _counting(place: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Where the values of each float tensor count; those of which all count are left out."""
    found = {}
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        for mask in MASKS:
            there = arguments.get(mask)
            if isinstance(there, Tensor) and there.shape == value.shape:
                found[name] = there
        if f"{place}.{name}" in _COUNTED_BY:
            found[name] = _COUNTED_BY[f"{place}.{name}"](arguments)
        elif place.startswith("advantages.turns.") and "counts" in arguments and value.ndim == 2:
            columns = torch.arange(value.shape[1])
            found[name] = columns < arguments["counts"][:, None]
    return found


_COUNTED_BY: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "objectives.control.one_step_target.next_values": lambda a: ~a["terminations"],
    "advantages.temporal.generalised_advantage.next_values": lambda a: ~a["terminations"],
    "advantages.shaping.shape_advantage.feature": lambda a: a["eligible"],
    "advantages.shaping.shape_advantage.scale": lambda a: a["eligible"],
    "advantages.shaping.shaped_rewards.feature": lambda a: a["eligible"],
    "advantages.data_shaping.centred_among_kept.rewards": lambda a: a["keep"],
    "objectives.supervised.values_from_logits.logits": lambda a: (
        torch.ones_like(a["logits"], dtype=torch.bool)
        if a["mask"] is None
        else a["mask"].unsqueeze(-1).expand_as(a["logits"])
    ),
    "advantages.turns.spread_turns.values": lambda a: torch.ones_like(a["values"]).bool(),
    "objectives.mixture.linear_reward.differences": lambda a: (
        a["mine"].unsqueeze(-1).expand_as(a["differences"])
    ),
}


# Kinds of values ------------------------------------------------------------------------------


def _modes(**ways: Callable[[list[int], Generator], Tensor]) -> Callable[..., Tensor]:
    def make(draw: st.DrawFn, shape: list[int], random: Generator) -> Tensor:
        return ways[draw(st.sampled_from(list(ways)))](shape, random)

    return make


def _uniform(shape: list[int], random: Generator) -> Tensor:
    return torch.rand(shape, generator=random)


def _whole(low: int, high: int) -> Callable[[list[int], Generator], Tensor]:
    return lambda shape, random: torch.randint(low, high, shape, generator=random)


def _constant(value: float) -> Callable[[list[int], Generator], Tensor]:
    return lambda shape, random: torch.full(shape, value)


def _simplex(shape: list[int], random: Generator) -> Tensor:
    return (2 * torch.randn(shape, generator=random)).softmax(-1)


def _game(draw: st.DrawFn, shape: list[int], random: Generator) -> Tensor:
    value = draw(st.sampled_from([_uniform, _constant(0.5), _constant(1.0)]))(shape, random)
    upper = value.triu(1)
    return upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(shape[-1])


def _signed(draw: st.DrawFn, shape: list[int], random: Generator) -> Tensor:
    return 2 * _game(draw, shape, random) - 1


def _prefix(draw: st.DrawFn, shape: list[int], random: Generator) -> Tensor:
    """Masks of responses without gaps, of all lengths."""
    lengths = torch.randint(0, shape[1] + 1, shape[:1], generator=random)
    return torch.arange(shape[1]) < lengths[:, None]


def _in_turn(count: int) -> Callable[[list[int], Generator], Tensor]:
    return lambda shape, random: torch.arange(shape[0]) % count


def _places(draw: st.DrawFn, shape: list[int], random: Generator) -> Tensor:
    return torch.randperm(8, generator=random)[: shape[0]]


_KINDS: dict[str, Callable[..., Tensor]] = {
    "real": _modes(
        normal=lambda shape, random: 2 * torch.randn(shape, generator=random),
        zero=_constant(0.0),
        equal=_constant(0.7),
        coarse=lambda shape, random: torch.randint(-1, 2, shape, generator=random).float(),
        large=lambda shape, random: 1e3 * torch.randn(shape, generator=random),
        small=lambda shape, random: 1e-30 * torch.randn(shape, generator=random),
    ),
    "logp": _modes(
        uniform=lambda shape, random: -3 * torch.rand(shape, generator=random),
        certain=_constant(0.0),
        unlikely=lambda shape, random: -40 * torch.rand(shape, generator=random),
    ),
    # a ratio of probabilities that no number can hold is infinite, as documented
    "logratio": _modes(
        normal=lambda shape, random: 2 * torch.randn(shape, generator=random),
        none=_constant(0.0),
        far=lambda shape, random: 40 - 80 * torch.rand(shape, generator=random),
    ),
    "rate": _modes(
        uniform=_uniform,
        none=_constant(0.0),
        all=_constant(1.0),
        coarse=lambda shape, random: torch.randint(0, 2, shape, generator=random).float(),
    ),
    "right": _modes(
        mixed=lambda shape, random: torch.randint(0, 2, shape, generator=random).float(),
        wrong=_constant(0.0),
        right=_constant(1.0),
    ),
    "flips": _modes(uniform=lambda shape, random: 0.49 * torch.rand(shape, generator=random)),
    "below": _modes(
        uniform=lambda shape, random: 0.999 * torch.rand(shape, generator=random),
        zero=_constant(0.0),
    ),
    "lower": _modes(zero=_constant(0.0), tenth=_constant(0.1)),
    "above": _modes(
        uniform=lambda shape, random: 0.1 + torch.rand(shape, generator=random),
        one=_constant(1.0),
        large=lambda shape, random: 1e3 * (0.1 + torch.rand(shape, generator=random)),
    ),
    "count": _modes(
        several=lambda shape, random: torch.randint(1, 5, shape, generator=random).float(),
        one=_constant(1.0),
    ),
    "turns": _modes(
        one=lambda shape, random: torch.ones(shape, dtype=torch.long), two=_whole(1, 3)
    ),
    "ids": _modes(some=_whole(0, 3), same=_whole(1, 2)),
    "pairs": _modes(two=_in_turn(2), same=_in_turn(1)),
    "users": _modes(two=_in_turn(2), one=_in_turn(1)),
    "bundle": _modes(two=_in_turn(2), own=_in_turn(9)),
    "places": _places,
    "bool": _modes(
        some=lambda shape, random: torch.rand(shape, generator=random) < 0.6,
        none=lambda shape, random: torch.zeros(shape, dtype=torch.bool),
        all=lambda shape, random: torch.ones(shape, dtype=torch.bool),
    ),
    "all": _modes(all=lambda shape, random: torch.ones(shape, dtype=torch.bool)),
    "prefix": _prefix,
    "simplex": _modes(
        some=_simplex,
        even=lambda shape, random: torch.zeros(shape).softmax(-1),
    ),
    "logsimplex": _modes(
        some=lambda shape, random: _simplex(shape, random).log(),
        even=lambda shape, random: torch.zeros(shape).log_softmax(-1),
    ),
    "game": _game,
    "signed": _signed,
}


# What no convention covers --------------------------------------------------------------------


def _tensors(draw: st.DrawFn, sizes: dict[str, int], random: Generator) -> list[Tensor]:
    return [_KINDS["real"](draw, shape, random) for shape in ([2], [1, 3])]


def _levels(draw: st.DrawFn, sizes: dict[str, int], random: Generator) -> tuple[float, float]:
    return (0.2, 0.8)


def _differences(draw: st.DrawFn, sizes: dict[str, int], random: Generator) -> Tensor:
    return _KINDS["real"](draw, [max(sizes.get("N", 2), 1), 3], random)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "objectives.gradients.inner_product.first": _tensors,
    "objectives.gradients.inner_product.second": _tensors,
    "objectives.gradients.without_lowering.direction": _tensors,
    "objectives.gradients.without_lowering.gradient": _tensors,
    "objectives.gradients.with_gradient.parameters": _tensors,
    "objectives.gradients.with_gradient.gradients": _tensors,
    "objectives.pairwise.debias.loss": lambda draw, *_: draw(st.sampled_from([logistic, hinge])),
    "advantages.risk.averaged_value_at_risk.levels": _levels,
    "advantages.consistency.answer_entropy.answers": (
        lambda draw, sizes, random: list("abca"[: sizes.setdefault("N", 3)])
    ),
    "objectives.mixture.em_reward_mixture.fit": (
        lambda *_: lambda mine, before: linear_reward(torch.eye(len(mine)), mine, before)
    ),
    "objectives.mixture.em_reward_mixture.margins": lambda *_: lambda model: model,
}
