"""A real method small enough to reason about: least squares on random data."""

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.methods.base import Method, Metrics, Place
from postgrad.seeding import generator


class RegressionSettings(Settings):
    size: int = setting(16, "rows a step", gt=0)
    bad_step: int | None = setting(None, "the step whose loss is made infinite")


class Regression(Method):
    """Fits y = w x by least squares; remembers how many rows it has seen."""

    Config = RegressionSettings
    recipe = {"learning_rate": 0.1, "log": []}

    def __init__(self, config: RegressionSettings, place: Place):
        super().__init__(config, place)
        self.network = nn.Linear(3, 1)
        self.seen = 0

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def collect(self, step: int) -> Batch:
        x = torch.randn(self.config.size, 3, generator=generator(self.place.seed, "x", step))
        y = x @ torch.tensor([1.0, -2.0, 3.0])
        if step == self.config.bad_step:
            y = y / 0
        self.seen += len(x)
        # global randomness too: a resumed run must find it where it was
        noise = 0.01 * torch.randn(len(x))
        return Batch(x=x, y=y + noise, mask=torch.ones(len(x), 2), cost=torch.full((len(x),), 2))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        error = (self.network(batch.x).squeeze(1) - batch.y).square()
        return error.sum() / batch.items, {"error": float(error.detach().mean())}

    def evaluate(self) -> Metrics:
        torch.rand(7)
        distance = self.network.weight - torch.tensor([[1.0, -2.0, 3.0]])
        return {"distance": float(distance.norm())}

    def samples(self, batch: Batch) -> list[dict[str, object]]:
        return [{"x": str(batch.x[0].tolist()), "y": float(batch.y[0])}]

    def state_dict(self) -> dict[str, object]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.seen = int(state["seen"])
