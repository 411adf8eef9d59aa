"""Every part by its name: what `mask=`, `denominator=`, `advantage=` and `gradient=` can be."""

from postgrad.config import Choice

_PARTS = "postgrad.methods.language.parts"
_METHODS = "postgrad.methods.language.verifiable"
_AGENTS = "postgrad.methods.agents"


class MaskChoice(Choice):
    kind = "mask"
    implementations = {
        "none": f"{_PARTS}.masks:NoMask",
        "ppo": f"{_PARTS}.masks:PPOClip",
        "one-side": f"{_PARTS}.masks:OneSide",
        "two-side": f"{_PARTS}.masks:TwoSide",
        "ring": f"{_PARTS}.masks:Ring",
        "gtpo": f"{_METHODS}.gtpo:Conflicts",
        "d3s": f"{_METHODS}.d3s:DownSampling",
    }


class DenominatorChoice(Choice):
    kind = "denominator"
    implementations = {
        "sampler": f"{_PARTS}.denominators:Sampler",
        "policy": f"{_PARTS}.denominators:Policy",
        "one": f"{_PARTS}.denominators:One",
    }


class AdvantageChoice(Choice):
    kind = "advantage"
    implementations = {
        "reward": f"{_PARTS}.advantages:Reward",
        "centred": f"{_PARTS}.advantages:Centred",
        "standardised": f"{_PARTS}.advantages:Standardised",
        "leave-one-out": f"{_PARTS}.advantages:LeaveOneOut",
        "batch": f"{_PARTS}.advantages:BatchStandardised",
        "lite": f"{_PARTS}.advantages:Lite",
        "moving-mean": f"{_PARTS}.advantages:MovingBaseline",
        "bnpo": f"{_METHODS}.bnpo:BetaNormalised",
        "gtpo": f"{_METHODS}.gtpo:LessEntropy",
        "copo": f"{_METHODS}.copo:Consistency",
        "single-stream": f"{_METHODS}.spo_single_stream:SingleStream",
        "early-call": f"{_AGENTS}.aspo:EarlyCall",
        "turns": f"{_AGENTS}.turn_credit:Turns",
        "riskpo": f"{_METHODS}.riskpo:BundledRisk",
        "red-drop": f"{_METHODS}.rec:Dropped",
        "red-weight": f"{_METHODS}.rec:Weighted",
        "asymre": f"{_METHODS}.rec:LoweredBaseline",
    }


class GradientChoice(Choice):
    kind = "gradient"
    implementations = {
        "token": f"{_PARTS}.gradients:Token",
        "sequence": f"{_PARTS}.gradients:Sequence",
        "shaped": f"{_PARTS}.gradients:Shaped",
    }
