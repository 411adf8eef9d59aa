"""Users' flow-matching models from diffusers as flow policies: Stable Diffusion 3 and FLUX.

The transformer is the velocity and the only part that is trained; text encoders and VAE stay as
they are. Needs the extra `diffusion` (and `lora` for adapters).
"""

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from postgrad.errors import MissingExtra, PostgradError
from postgrad.models.adapters import LoraSettings, named_layers
from postgrad.models.flow import FlowPolicy
from postgrad.models.network import linear_layers

# an encoded prompt of Stable Diffusion 3 takes about 5 MB
_ENCODED_PROMPTS = 256


class DiffusersFlow(FlowPolicy):
    """A diffusers pipeline as a flow policy. Subclasses know how its transformer is called."""

    network: Any  # the pipeline's transformer

    def __init__(
        self,
        pipeline: Any,
        *,
        resolution: int,
        guidance: float,
        adapters: LoraSettings | None = None,
    ):
        """`resolution` is the side of the square images in pixels; `adapters` None trains all."""
        super().__init__()
        self.pipeline = pipeline
        self.guidance = guidance
        self._adapters = adapters
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.network = pipeline.transformer
        if adapters is None:
            self.network.requires_grad_(True)
        else:
            _add_adapters(self.network, adapters)
        # in pixels: what one latent pixel, and one token of 2x2 of them, stand for
        unit = pipeline.vae_scale_factor * 2
        if resolution < unit or resolution % unit:
            raise PostgradError(
                f"resolution: this model's images have sides that are multiples of {unit} pixels, "
                f"got {resolution}"
            )
        self.resolution = resolution
        self._side = resolution // pipeline.vae_scale_factor
        self._encoded = lru_cache(_ENCODED_PROMPTS)(self._encode)

    @abstractmethod
    def _encode(self, prompt: str) -> tuple[Tensor, ...]:
        """What the text encoders make of a prompt, each tensor with a batch dimension of one."""

    @abstractmethod
    def _image_latents(self, latents: Tensor) -> Tensor:
        """Latents as the VAE takes them, `[N, C, H, W]`."""

    @abstractmethod
    def _tokens(self) -> int:
        """How many image tokens the transformer sees."""

    def _conditions(self, prompts: Sequence[str]) -> list[Tensor]:
        with torch.no_grad():
            encoded = [self._encoded(prompt) for prompt in prompts]
        return [torch.cat(parts) for parts in zip(*encoded, strict=True)]

    def times(self, steps: int) -> Tensor:
        return self._schedule(num_inference_steps=steps)

    def _schedule(self, **settings: Any) -> Tensor:
        """The scheduler's times, shifted for the resolution where it asks for that."""
        scheduler = self.pipeline.scheduler
        if scheduler.config.use_dynamic_shifting:
            settings["mu"] = self._shift(scheduler.config)
        scheduler.set_timesteps(**settings)
        times: Tensor = scheduler.sigmas.float().cpu()
        return times

    def _shift(self, config: Any) -> float:
        """The resolution's shift of the schedule, linear in the number of tokens (diffusers)."""
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        return float(config.base_shift + slope * (self._tokens() - config.base_image_seq_len))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = self._image_latents(latents).to(vae.dtype)
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        decoded = vae.decode(latents, return_dict=False)[0]
        images: Tensor = self.pipeline.image_processor.postprocess(decoded, output_type="pt")
        return images.float()

    def require(self, prompt: str, where: str) -> None:
        """Any text will do; empty ones are found when data is loaded."""

    def freeze_reference(self) -> None:
        if self._adapters is None:
            super().freeze_reference()

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._adapters is None:
            with super().reference():
                yield
            return
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def save(self, folder: Path) -> None:
        """The whole pipeline, or its adapters for diffusers' `load_lora_weights`."""
        if self._adapters is None:
            self.pipeline.save_pretrained(folder, safe_serialization=True)
            return
        from peft.utils import get_peft_model_state_dict

        # the metadata carries alpha, without which the adapters would load at another scale
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.network),
            transformer_lora_adapter_metadata=self.network.peft_config["default"].to_dict(),
        )


class StableDiffusion3Flow(DiffusersFlow):
    """Stable Diffusion 3 and 3.5, with classifier-free guidance where `guidance` is above 1."""

    def __init__(self, pipeline: Any, **settings: Any):
        super().__init__(pipeline, **settings)
        self.latent_shape = (self.network.config.in_channels, self._side, self._side)
        self.cost = self._tokens() * (2 if self.guidance > 1 else 1)

    def _tokens(self) -> int:
        return int((self._side // self.network.config.patch_size) ** 2)

    def _encode(self, prompt: str) -> tuple[Tensor, ...]:
        guided = self.guidance > 1
        text, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=guided
        )
        return (text, pooled, negative, negative_pooled) if guided else (text, pooled)

    def _image_latents(self, latents: Tensor) -> Tensor:
        return latents

    def velocity(self, latents: Tensor, time: Tensor, prompts: Sequence[str]) -> Tensor:
        text, pooled, *negative = self._conditions(prompts)
        if negative:
            text, pooled = torch.cat([negative[0], text]), torch.cat([negative[1], pooled])
            latents, time = torch.cat([latents, latents]), torch.cat([time, time])
        velocity: Tensor = self.network(
            hidden_states=latents.to(self.network.dtype),
            timestep=time * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        if not negative:
            return velocity
        without, with_prompt = velocity.chunk(2)
        return without + self.guidance * (with_prompt - without)


class FluxFlow(DiffusersFlow):
    """FLUX.1, whose guidance is an input of the network. Latents are packed, `[tokens, C]`."""

    def __init__(self, pipeline: Any, **settings: Any):
        super().__init__(pipeline, **settings)
        self.latent_shape = (self._tokens(), self.network.config.in_channels)
        self.cost = self._tokens()

    def _tokens(self) -> int:
        return int((self._side // 2) ** 2)

    def times(self, steps: int) -> Tensor:
        # as its pipeline does, which overrules the scheduler's own spacing
        return self._schedule(sigmas=torch.linspace(1, 1 / steps, steps).tolist())

    def _encode(self, prompt: str) -> tuple[Tensor, ...]:
        text, pooled, _ = self.pipeline.encode_prompt(prompt, None)
        return text, pooled

    def _image_latents(self, latents: Tensor) -> Tensor:
        unpacked: Tensor = self.pipeline._unpack_latents(
            latents, self.resolution, self.resolution, self.pipeline.vae_scale_factor
        )
        return unpacked

    def velocity(self, latents: Tensor, time: Tensor, prompts: Sequence[str]) -> Tensor:
        text, pooled = self._conditions(prompts)
        place: dict[str, Any] = {"device": latents.device, "dtype": self.network.dtype}
        half = self._side // 2
        guided = self.network.config.guidance_embeds
        velocity: Tensor = self.network(
            hidden_states=latents.to(self.network.dtype),
            timestep=time,
            guidance=torch.full_like(time, self.guidance) if guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, **place),
            img_ids=self.pipeline._prepare_latent_image_ids(len(latents), half, half, **place),
            return_dict=False,
        )[0]
        return velocity.float()


def load_diffusers_flow(
    name: str,
    *,
    resolution: int,
    guidance: float,
    adapters: LoraSettings | None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> DiffusersFlow:
    """The pipeline in the folder `name`, or of that Hugging Face id, as a flow policy.

    `precision` is that of the weights; with `adapters` None the transformer's stay in fp32.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusion") from error
    if os.path.isdir(name) and not (Path(name) / "model_index.json").is_file():
        raise PostgradError(
            f"model: the folder {name} is no diffusers pipeline: no model_index.json"
        )
    try:
        listed = DiffusionPipeline.load_config(name)
        # a pipeline without its largest text encoder loads only if told that this is meant
        absent = {
            part: None for part, kind in listed.items() if kind in ([None, None], (None, None))
        }
        pipeline = DiffusionPipeline.from_pretrained(
            name,
            **absent,
            torch_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, SafetensorError) as error:
        line = " ".join(str(error).split())[:300]
        raise PostgradError(f"model: cannot load the diffusers model {name!r}: {line}") from error
    return diffusers_flow(
        pipeline.to(device), resolution=resolution, guidance=guidance, adapters=adapters
    )


def diffusers_flow(
    pipeline: Any, *, resolution: int, guidance: float, adapters: LoraSettings | None = None
) -> DiffusersFlow:
    """A diffusers pipeline that is already loaded, as a flow policy."""
    kinds = {"StableDiffusion3Pipeline": StableDiffusion3Flow, "FluxPipeline": FluxFlow}
    found = type(pipeline).__name__
    if found not in kinds:
        known = " or ".join(kinds)
        raise PostgradError(f"model: expected a flow-matching {known}, found a {found}")
    if adapters is None:
        pipeline.transformer.float()
    return kinds[found](pipeline, resolution=resolution, guidance=guidance, adapters=adapters)


def _add_adapters(network: Any, adapters: LoraSettings) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtra("peft", "lora") from error
    everywhere = [name for name, _ in linear_layers(network)]
    network.add_adapter(
        LoraConfig(
            r=adapters.rank,
            lora_alpha=adapters.alpha,
            init_lora_weights="gaussian",
            target_modules=named_layers(network, adapters) or everywhere,
        )
    )
