"""Secrets of RLHF in Large Language Models Part II: Reward Modeling."""

import json
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Optimise, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import GivenData, find_examples
from postgrad.methods.language.comparisons import accuracy
from postgrad.methods.language.preference.base import Comparisons
from postgrad.methods.language.rlhf.preference_strength import (
    Treatment,
    known_strength,
    parse_remedies,
    strength_metrics,
    treated,
    untreated,
)
from postgrad.methods.language.rlhf.reward_models import (
    known_rewards,
    pair_features,
    reward_metrics,
    scalar_model,
)
from postgrad.methods.language.rlhf.shifted_responses import (
    ShiftedSettings,
    displaced,
    find_shifted_responses,
)
from postgrad.models.language import LanguagePolicy
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.contrastive import info_nce
from postgrad.objectives.reward_modeling import bradley_terry, preference_strength, swav
from postgrad.sampling.epochs import Epochs
from postgrad.seeding import derive, generator
from postgrad.tasks import Examples

STRENGTH_FILE = "preference_strength.jsonl"


class ContrastSettings(Settings):
    """The contrast between two views of what the reward is read from."""

    kind: Literal["none", "simcse", "swav"] = setting("none", "which contrastive loss is added")
    weight: float = setting(0.1, "beta, its weight; the paper's is not known", gt=0)
    of: Literal["difference", "response"] = setting(
        "difference", "features of each pair's difference, or of every response"
    )
    temperature: float = setting(0.1, "tau; the paper's is not known", gt=0)
    dropout: float = setting(
        0.1, "share of a view's features that are 0", gt=0, lt=1, source="SimCSE paper"
    )
    prototypes: int = setting(32, "K, of SwAV; the paper's is not known", ge=2)


class RewardModelingSettings(ShiftedSettings):
    """Settings of reward modelling."""

    model: str = setting(
        "smollm2", "language model whose body the reward model has, or reward model to go on from"
    )
    data: DataSettings = setting(
        DataSettings(name="docstrings"),
        "preferences; a column `strength` takes the ensemble's place",
    )
    batch_size: int = setting(32, "pairs a step", gt=0, source="official code: 4 on each of 8 GPUs")
    max_response_tokens: int = setting(512, "longer responses are cut", gt=0)
    strength: str = setting(
        "none", "what preference strength is for: none, or flip, drop, soft, margin joined by +"
    )
    flip_share: float = setting(
        0.1, "share of the weakest pairs that flip or drop is for", ge=0, le=0.5,
        source="paper: 10 to 20 %",
    )  # fmt: skip
    ensemble: int = setting(
        10, "reward models whose mean is a pair's strength, each trained in one of the first steps",
        ge=2, source="paper",
    )  # fmt: skip
    ensemble_epochs: int = setting(
        1, "their passes over the pairs: few, lest they learn noise", gt=0
    )
    normalise_strength: bool = setting(False, "let each model of the ensemble count the same")
    label_smoothing: float = setting(
        0.0, "constant probability p that a label counts as wrong", ge=0, lt=0.5
    )
    contrast: ContrastSettings = setting(ContrastSettings(), "contrastive term")

    @field_validator("strength")
    @classmethod
    def _known(cls, value: str) -> str:
        parse_remedies(value)
        return value

    @model_validator(mode="after")
    def _one_smoothing(self) -> "RewardModelingSettings":
        if self.label_smoothing and "soft" in self.strength:
            raise ValueError("label_smoothing: strength=soft gives every pair its own, so it is 0")
        return self


class Given(GivenData, total=False):
    """Objects that a caller in Python may pass in place of names."""

    model: LanguagePolicy | ScalarModel
    meta_policy: LanguagePolicy
    meta_data: Examples | list[dict[str, Any]]


class RewardModeling(Method):
    """Secrets of RLHF in Large Language Models Part II: Reward Modeling (Wang, Zheng, Chen et al.
    2024, arXiv:2401.06080).

    A reward r(x, y), one number read from a language model's last hidden state h, is fitted to
    preferences, d = r(x, y_c) - r(x, y_r). What makes it fail: pairs with wrong labels, and a
    policy that has moved away from the responses in them.

        L    = -(1 - p) log sigma(d - m) - p log sigma(m - d)        (m = p = 0: Bradley-Terry)
        mu   = mean of d over an ensemble, sigma its deviation       (preference strength)
        L_CL = -log softmax_j cos(h_s^i, h_t^j) / tau                (contrast=simcse), or SwAV's
        J    = mean_x (2/k^2) sum_{i<j} sigma(|r(x, y_i) - r(x, y_j)|)      (y_i of the new policy)
        theta' = theta + eta dJ/dtheta,   theta <- theta - alpha dL/dtheta at theta'       (MetaRM)

    `strength` says what mu is for: `flip` the pairs with the least, or `drop` them, `soft` labels
    p = sigma(-mu), `margin` m = mu (after flipping |mu|, else at least 0); the two maps are
    (uncertain). Each of the run's first `ensemble` steps trains one reward model on the same pairs
    in its own order, at the peak learning rate, and scores them; data with a column `strength` need
    none. The result stands in model/preference_strength.jsonl, as data for other methods.

    Deviations: the two views h_s, h_t of the contrast are two dropout masks on the features that
    the head reads, since dropout inside networks is off in this library. MetaRM is of first order,
    as its update is written (uncertain: which order was run), and the step at theta' is AdamW's.
    The official code's language-model term (off there by default), and its inverse square root
    schedule, are left out. Equations from the paper; the official code holds Bradley-Terry alone.
    """

    Config = RewardModelingSettings
    recipe = {
        "precision": "auto",
        "learning_rate": 5e-6,
        "adam_betas": (0.9, 0.95),
        "adam_epsilon": 1e-6,
        "steps": 1000,
    }
    config: RewardModelingSettings

    def __init__(self, config: RewardModelingSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place)
        data, held_out, order = find_examples(config, place, "preferences", given)
        if config.contrast.kind != "none" and order.size < 2:
            raise PostgradError("contrast.kind: a contrast needs a batch_size of at least 2, got 1")
        self.remedies = parse_remedies(config.strength)
        known = known_strength(data) if self.remedies else None
        self.members = config.ensemble if self.remedies and known is None else 0
        if place.steps <= self.members:
            raise PostgradError(
                f"steps: the first {self.members} train the ensemble of strength="
                f"{config.strength}: expected more than that, got {place.steps}"
            )
        self.model = scalar_model(config, place, given.get("model"))
        self.model.prompts_as_turns = data.chat and self.model.has_chat_template
        self.data = Comparisons(self.model, data, config)
        self.held_out = Comparisons(self.model, held_out, config) if held_out else None
        self.scores = torch.full((self.members, len(data), 2), torch.nan)  # of the ensemble
        self._strength = known
        self._treatment: Treatment | None = None
        self.prototypes: nn.Linear | None = None
        if config.contrast.kind == "swav":
            width: Any = self.model.head.in_features
            self.prototypes = nn.Linear(width, config.contrast.prototypes, bias=False)
            self.prototypes.to(self.model.device)
        self.shifted = find_shifted_responses(
            self.model, data, config, place, given.get("meta_policy"), given.get("meta_data")
        )

    def whole_weights(self) -> str | None:
        return None if self.shifted is None else "takes a gradient of its own (meta)"

    def modules(self) -> dict[str, nn.Module]:
        if self.prototypes is None:
            return {"reward_model": self.model}
        return {"reward_model": nn.ModuleList([self.model, self.prototypes])}

    # The batch -------------------------------------------------------------------------------

    def collect(self, step: int) -> Batch:
        if step < self.members:
            everything = self.data.batch(torch.arange(len(self.data)))
            return everything.with_fields(member=torch.full((len(everything),), step))
        pairs = self.treatment()
        order = Epochs(len(pairs.kept), self.config.batch_size, self.place.seed)
        index = pairs.kept[order.indices(step - self.members)]
        batch = self.data.batch(index).with_fields(
            flip=pairs.flip[index],
            smoothing=pairs.smoothing[index],
            margin=pairs.margin[index],
            step=torch.full((len(index),), step),
        )
        if self.config.contrast.kind != "none":
            # a pair is told from the others of its batch, which so must not be cut into parts
            batch = batch.with_fields(cost=torch.zeros(len(index), dtype=torch.long))
        return batch

    def strength(self) -> tuple[Tensor, Tensor]:
        """mu and sigma `[M]` of the training pairs; sigma is 0 where the data give mu."""
        if self._strength is not None:
            return self._strength, torch.zeros_like(self._strength)
        return preference_strength(self.scores, normalised=self.config.normalise_strength)

    def treatment(self) -> Treatment:
        """What is done with the training pairs, once their strength is known."""
        if self._treatment is None:
            smoothing = self.config.label_smoothing
            if self.remedies:
                strength, _ = self.strength()
                self._treatment = treated(
                    strength, self.remedies, self.config.flip_share, smoothing
                )
            else:
                self._treatment = untreated(len(self.data), smoothing)
        return self._treatment

    # The update ------------------------------------------------------------------------------

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        if "member" in batch:
            return self._train_member(batch, optimise)
        if self.shifted is None or not self.config.meta.rate:
            return super().update(batch, optimise)
        with optimise.autocast():
            spread, direction = self.shifted.spread(int(batch.step[0]))
        with displaced(self.model, direction, self.config.meta.rate):
            metrics = super().update(batch, optimise)
        return {**metrics, "meta/spread": spread}

    def _train_member(self, batch: Batch, optimise: Optimise) -> Metrics:
        """One reward model of the ensemble, from the initial weights; it leaves its scores."""
        member = int(batch.member[0])
        own = derive(self.place.seed, "ensemble", member)
        order = Epochs(len(batch), self.config.batch_size, own)
        every = []
        with optimise.looking_ahead(share=1.0):
            for step in range(self.config.ensemble_epochs * order.per_epoch):
                part = batch.select(order.indices(step))
                every.append(optimise(self.plain_loss, part))
            with optimise.autocast():
                self.scores[member] = known_rewards(self.model, batch)
        metrics = {
            f"ensemble/{name}": sum(m[name] for m in every) / len(every)
            for name in ("loss", "rewards/accuracy")
        }
        if member + 1 == self.members:
            metrics |= strength_metrics(*self.strength(), self.data.examples)
        return metrics

    def plain_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Bradley-Terry, by which the ensemble is trained."""
        rewards = self.model.read(pair_features(self.model, batch))
        losses = bradley_terry(rewards[:, 0] - rewards[:, 1])
        return losses.sum() / batch.items, reward_metrics(rewards, batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        features = pair_features(self.model, batch)
        rewards = self.model.read(features)
        device = rewards.device
        losses = bradley_terry(
            rewards[:, 0] - rewards[:, 1],
            smoothing=batch.smoothing.to(device),
            margin=batch.margin.to(device),
            flip=batch.flip.to(device),
        )
        value, metrics = losses.sum() / batch.items, reward_metrics(rewards, batch)
        if self.config.contrast.kind != "none":
            contrast = self._contrast(features, int(batch.step[0]))
            metrics |= {"loss/pairs": float(value.detach()), "loss/contrast": float(contrast)}
            value = value + self.config.contrast.weight * contrast
        return value, metrics

    def _contrast(self, features: Tensor, step: int) -> Tensor:
        """The mean contrastive loss of features `[B, 2, d]`."""
        config = self.config.contrast
        of_pairs = features[:, 0] - features[:, 1]
        chosen = of_pairs if config.of == "difference" else features.flatten(0, 1)
        random = generator(self.place.seed, "views", step)
        view_s, view_t = (_dropped(chosen.float(), config.dropout, random) for _ in range(2))
        if self.prototypes is None:
            return info_nce(view_s, view_t, temperature=config.temperature).mean()
        with torch.autocast(features.device.type, enabled=False):
            weight = self.prototypes.weight
            return swav(view_s, view_t, weight, temperature=config.temperature).mean()

    # What is told of it ----------------------------------------------------------------------

    def describe_batch(self, batch: Batch) -> Metrics:
        if not self.remedies or "member" in batch:
            return {}
        return {
            "pairs/flipped": float(batch.flip.float().mean()),
            "pairs/smoothing": float(batch.smoothing.mean()),
            "pairs/margin": float(batch.margin.mean()),
        }

    def evaluate(self) -> Metrics:
        """Accuracy, margin and Bradley-Terry loss on held-out pairs."""
        if self.held_out is None:
            return {}
        batch = self.held_out.batch(torch.arange(len(self.held_out)))
        rewards = known_rewards(self.model, batch)
        margin = rewards[:, 0] - rewards[:, 1]
        return {
            "accuracy": accuracy(rewards, batch.scores, batch.present),
            "margin": float(margin.mean()),
            "loss": float(bradley_terry(margin).mean()),
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        part = batch.select(torch.arange(min(len(batch), 4)))
        rewards = known_rewards(self.model, part).tolist()
        return [
            {
                "prompt": self.model.decode(part.prompts[i]),
                "chosen": self.model.decode(chosen),
                "rejected": self.model.decode(rejected),
                "reward of chosen": rewards[i][0],
                "reward of rejected": rewards[i][1],
            }
            for i, (chosen, rejected) in enumerate(part.responses)
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.examples.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores} if self.members else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.members:
            self.scores.copy_(state["scores"])

    def save(self, folder: Path) -> None:
        """The reward model, and the training pairs with the strength that the ensemble found."""
        self.model.save(folder)
        if self.members and not bool(self.scores.isnan().any()):
            found = zip(self.data.examples.rows, *map(Tensor.tolist, self.strength()), strict=True)
            lines = [
                json.dumps({**row, "strength": mu, "strength_deviation": sigma}, default=str)
                for row, mu, sigma in found
            ]
            (folder / STRENGTH_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _dropped(features: Tensor, share: float, random: torch.Generator) -> Tensor:
    """A view of features: a share of them 0, the others larger by as much."""
    kept = torch.rand(features.shape, generator=random) >= share
    return features * kept.to(features) / (1 - share)
