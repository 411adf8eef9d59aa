"""SimCLR, and CLIP's symmetric loss for pairs of texts: one temperature for all."""

from torch import Tensor

from postgrad.config import setting
from postgrad.methods.base import Metrics
from postgrad.methods.representation.base import Contrast, ContrastSettings
from postgrad.objectives.contrastive import clip_loss, nt_xent


class SimCLRSettings(ContrastSettings):
    temperature: float = setting(
        0.1, "divides every similarity", source="arXiv:2002.05709, best of its table 5", gt=0
    )


class SimCLR(Contrast):
    """A Simple Framework for Contrastive Learning of Visual Representations (arXiv:2002.05709).

    A view of a sample must be told from the 2B - 2 views of the other samples in the batch by its
    similarity to the sample's other view:

        loss_i = -log( exp(sim(a_i, b_i) / tau) / sum_{z != a_i} exp(sim(a_i, z) / tau) ),

    averaged over both views. For pairs of texts it is CLIP's loss (arXiv:2103.00020): the right
    positive is told from the other positives, and the right anchor from the other anchors.

    Deviations: AdamW, not LARS; shifts and noise, not crops and colours, since the images here are
    small and grey.
    """

    Config = SimCLRSettings
    config: SimCLRSettings

    def contrast(self, left: Tensor, right: Tensor, index: Tensor) -> tuple[Tensor, Metrics]:
        loss = clip_loss if self.source.bimodal else nt_xent
        return loss(left, right, temperature=self.config.temperature), {}
