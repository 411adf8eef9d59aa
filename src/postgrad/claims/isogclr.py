"""iSogCLR's claim: on long-tailed data a temperature per sample beats one temperature for all."""

import tempfile
from pathlib import Path
from typing import Any

from postgrad import api
from postgrad.claims.base import Claim, Outcome
from postgrad.methods.representation.isogclr import ISogCLR
from postgrad.training.record import METRICS, read_rows

TEMPERATURES = (0.05, 0.1, 0.2, 0.5)
METRIC = "probe_balanced_accuracy"
EPOCH = 7  # steps: 485 training images in batches of 64
COMMON: dict[str, Any] = {
    "steps": 100 * EPOCH,
    "batch_size": 64,
    "views": {"shift": 2, "noise": 0.1},
    "evaluate_every": 20 * EPOCH,
    "log": [],
    "report": False,
}
# the best on validation images of splits that are not reported, see the notes
SIMCLR: dict[str, Any] = {"learning_rate": 5e-3}
ISOGCLR: dict[str, Any] = {"learning_rate": 2e-3, "rho": 1.0}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"SimCLR, tau {tau}": ("simclr", {**SIMCLR, "temperature": tau}) for tau in TEMPERATURES},
    **{
        f"SogCLR, tau {tau}": ("isogclr", {**ISOGCLR, "tau_init": tau, "eta": 0.0})
        for tau in TEMPERATURES
    },
    **{
        f"iSogCLR, tau from {tau}": ("isogclr", {**ISOGCLR, "tau_init": tau})
        for tau in TEMPERATURES
    },
    "iSogCLR, tau from 0.1, rho 0.3": ("isogclr", {**ISOGCLR, "tau_init": 0.1, "rho": 0.3}),
    "iSogCLR, tau from 0.1, gamma 1": ("isogclr", {**ISOGCLR, "tau_init": 0.1, "gamma": 1.0}),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    """Train one arm on the split of `seed`; probes of its representations on the test images."""
    slug, own = ARMS[arm]
    data = {"name": "digits", "settings": {"size": 10, "split_seed": seed}}
    size = {"steps": EPOCH, "evaluate_every": 0} if quick else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        settings = {**COMMON, **own, **size, "data": data, "seed": seed, "output": str(path)}
        done = api.train(slug, device="cpu", **settings)
        rows = read_rows(path / METRICS)
    values = dict(done.evaluation)
    values["probe_balanced_accuracy_untrained"] = rows[0][f"evaluation/{METRIC}"]
    curves = {
        METRIC: [
            (row["step"] / EPOCH, round(row[f"evaluation/{METRIC}"], 4))
            for row in rows
            if f"evaluation/{METRIC}" in row
        ]
    }
    if isinstance(done.method, ISogCLR) and own.get("eta") != 0:
        found = done.method.tau_by_class().tolist()
        curves["mean tau by class"] = [(float(c), round(t, 4)) for c, t in enumerate(found)]
    return Outcome(values, curves)


CLAIM = Claim(
    slug="isogclr",
    statement=(
        "On long-tailed images, a temperature learned for each sample gives representations that "
        "classify better, over all classes alike, than SimCLR's at the same temperature for all"
    ),
    task=(
        "scikit-learn's digits at random places of 10 x 10 pixels, class c with 150 * 0.7^c "
        "training images; 100 epochs in batches of 64, shifts and noise; linear probe, balanced "
        "accuracy on test images"
    ),
    metric=METRIC,
    higher_is_better=True,
    method="iSogCLR, tau from 0.1",
    baseline="SimCLR, tau 0.1",
    arms=tuple(ARMS),
    run=run,
    notes=(
        "Tuned on validation images of other splits (3 seeds), with as many trials for each "
        "method; the test images belong to no split's training or validation part. At tau 0.1, "
        "the learning rate over 5e-4, 2e-3 and 5e-3 (best for SimCLR: 5e-3, for iSogCLR: 2e-3), "
        "SimCLR's tau over the four shown (best: 0.1), iSogCLR's rho over 0.1, 0.3, 1 and 2 "
        "(best: 1). What the paper says of robustness is seen: between the best and the worst "
        "starting temperature of a seed, accuracy differs by 0.04 on average for iSogCLR, by 0.07 "
        "for SogCLR and by 0.08 for SimCLR. The mean temperature of a class goes with its "
        "frequency (Spearman's correlation 0.5 on average, positive for every seed). gamma 1 "
        "keeps no moving average of the normaliser, which here is an epoch old at every visit. "
        "Digits stand at random places because on the plain 8 x 8 images SimCLR's accuracy "
        "hardly depends on its temperature."
    ),
)
