"""Flow policies, their samplers, averaged weights, and diffusers models as policies."""

import base64
import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from postgrad.errors import PostgradError
from postgrad.models.adapters import LoraSettings
from postgrad.models.averaging import AveragedWeights
from postgrad.models.cache import cached_folder
from postgrad.models.diffusers_flow import diffusers_flow, load_diffusers_flow
from postgrad.models.flow import (
    ClassFlow,
    FlowPolicy,
    Pretraining,
    digits_flow,
    digits_images,
    flow_matching_loss,
    load_class_flow,
)
from postgrad.models.pictures import png_data_uri
from postgrad.sampling.flow import deterministic_samples, stochastic_trajectories

SHORT = Pretraining(width=64, blocks=2, steps=150)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for this file, so that what is pretrained once is there for all tests."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("POSTGRAD_CACHE", str(folder))
    return folder


class TowardsPoint(FlowPolicy):
    """The exact velocity of a flow whose data are one point: dx/dt = (x - point) / t."""

    def __init__(self, point: torch.Tensor):
        super().__init__()
        self.point = nn.Parameter(point)
        self.network = nn.Identity()
        self.latent_shape = tuple(point.shape)
        self.cost = 1

    def velocity(self, latents, time, prompts):
        return (latents - self.point) / time.view(-1, *[1] * (latents.ndim - 1))

    def decode(self, latents):
        return latents

    def require(self, prompt, where):
        pass

    def save(self, folder):
        pass


def test_deterministic_sampling_follows_a_straight_flow_exactly():
    point = torch.tensor([0.3, -1.2, 2.0])
    for steps in (1, 7):
        samples = deterministic_samples(
            TowardsPoint(point), ["a"] * 5, steps, torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(samples, point.expand(5, 3), atol=1e-5, rtol=0)


def test_stochastic_sampling_keeps_the_marginals_of_the_flow():
    """For data at one point the marginal at t is N((1 - t) point, t^2), whatever the noise."""
    point = torch.full((8,), 0.7)
    drawn = stochastic_trajectories(
        TowardsPoint(point), ["a"] * 2000, 200, 0.7, torch.Generator().manual_seed(1)
    )
    for step in (100, 160):
        time = float(drawn.times[step])
        latents = drawn.path[:, step]
        assert float(latents.mean()) == pytest.approx((1 - time) * 0.7, abs=0.02)
        assert float(latents.std()) == pytest.approx(time, rel=0.04)


def test_trajectories_hold_what_their_steps_were_drawn_from():
    policy = ClassFlow("ab", (1, 4, 4), 16, 1)
    drawn = stochastic_trajectories(policy, list("abba"), 5, 0.7, torch.Generator().manual_seed(2))
    assert drawn.path.shape == (4, 6, 1, 4, 4)
    assert drawn.means.shape == (4, 5, 1, 4, 4)
    assert drawn.logprobs.shape == (4, 5)
    noise = (drawn.path[:, 1:] - drawn.means) / drawn.deviations.view(1, -1, 1, 1, 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = normal.log_prob(noise).flatten(2).mean(2) - drawn.deviations.log()
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=1e-5)
    assert 0.7 < float(noise.std()) < 1.3
    again = stochastic_trajectories(policy, list("abba"), 5, 0.7, torch.Generator().manual_seed(2))
    assert torch.equal(again.path, drawn.path)


def test_flow_matching_is_minimal_at_the_exact_velocity():
    point = torch.tensor([0.5, -0.5])
    data = point.expand(64, 2)
    exact = flow_matching_loss(
        TowardsPoint(point), data, ["a"] * 64, torch.Generator().manual_seed(0)
    )
    assert exact.item() < 1e-8
    off = flow_matching_loss(
        TowardsPoint(point + 0.1), data, ["a"] * 64, torch.Generator().manual_seed(0)
    )
    assert off.item() > 0.01


def test_digits_flow_learns_the_digits_and_is_cached(own_cache: Path):
    policy = digits_flow(0, SHORT)
    folders = sorted(path.name for path in own_cache.iterdir())
    assert len(folders) == 1
    again = digits_flow(0, SHORT)
    assert sorted(path.name for path in own_cache.iterdir()) == folders
    for first, second in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)
    images, labels = digits_images()
    prompts = [str(number % 10) for number in range(200)]
    latents = deterministic_samples(policy, prompts, 20, torch.Generator().manual_seed(0))
    drawn = policy.decode(latents)
    assert drawn.shape == (200, 1, 8, 8)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1
    nearest = torch.cdist(drawn.flatten(1), images.flatten(1)).argmin(1)
    right = labels[nearest] == torch.arange(200) % 10
    assert float(right.float().mean()) > 0.5  # chance is 0.1


def test_other_seeds_and_settings_are_other_models(own_cache: Path):
    tiny = Pretraining(width=8, blocks=1, steps=1)
    first, second = digits_flow(1, tiny), digits_flow(2, tiny)
    assert not torch.equal(first.network.enter.weight, second.network.enter.weight)
    wider = digits_flow(1, Pretraining(width=16, blocks=1, steps=1))
    assert wider.network.enter.weight.shape[0] == 16


def test_a_model_from_the_cache_leaves_the_random_state_of_one_made_now():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        digits_flow(3, Pretraining(width=8, blocks=1, steps=1))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_class_flow_round_trip_and_damage(tmp_path: Path):
    policy = ClassFlow(("cat", "dog"), (3, 4, 4), 8, 1)
    policy.save(tmp_path / "flow")
    again = load_class_flow(tmp_path / "flow")
    x, time = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.9])
    torch.testing.assert_close(
        again.velocity(x, time, ["dog", "cat"]), policy.velocity(x, time, ["dog", "cat"])
    )
    (tmp_path / "flow" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(PostgradError, match="no class flow that can be read"):
        load_class_flow(tmp_path / "flow")
    with pytest.raises(
        PostgradError, match="row 3: unknown class 'bird': expected one of cat, dog"
    ):
        policy.require("bird", "prompts.csv, row 3")


def test_reference_is_the_policy_when_it_was_frozen():
    policy = ClassFlow("ab", (1, 2, 2), 8, 1)
    x, time = torch.randn(2, 1, 2, 2), torch.tensor([0.2, 0.9])
    with pytest.raises(ValueError, match="freeze_reference"), policy.reference():
        pass
    policy.freeze_reference()
    before = policy.velocity(x, time, "ab").detach()
    with torch.no_grad():
        policy.network.leave.bias.add_(1.0)
    assert torch.allclose(policy.velocity(x, time, "ab"), before + 1, atol=1e-5)
    with policy.reference():
        assert torch.equal(policy.velocity(x, time, "ab"), before)
    assert torch.allclose(policy.velocity(x, time, "ab"), before + 1, atol=1e-5)


def test_a_failed_build_leaves_nothing_in_the_cache(own_cache: Path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half", encoding="utf-8")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cached_folder("broken", {}, fail)
    assert not list(own_cache.glob("*broken*"))


def test_the_cache_is_taken_from_whoever_was_first():
    def another_was_faster(folder: Path) -> None:
        target = folder.parent / folder.name.rsplit("-", 1)[0].removeprefix(".")
        target.mkdir()
        (target / "who").write_text("other", encoding="utf-8")
        (folder / "who").write_text("us", encoding="utf-8")

    found = cached_folder("race", {"seed": 1}, another_was_faster)
    assert (found / "who").read_text(encoding="utf-8") == "other"


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PostgradError, match="cannot write the cache"):
        cached_folder("model", {}, lambda folder: None)


def test_averaged_weights_follow_and_step_aside():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    average = AveragedWeights(layer, decay=0.9)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    average.update()  # decay (1 + 1) / (10 + 1)
    with average.applied():
        assert float(layer.weight) == pytest.approx(1 - 2 / 11)
    assert float(layer.weight) == 1.0
    other = AveragedWeights(layer, decay=0.9)
    other.load_state_dict(average.state_dict())
    for averaged in (average, other):
        for _ in range(200):
            averaged.update()
    with other.applied():
        assert float(layer.weight) == pytest.approx(1.0, abs=1e-6)
    assert other.state_dict()["updates"] == 201


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels(channels: int):
    image = torch.rand(channels, 2, 3)
    uri = png_data_uri(image, smallest_side=2)
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    start = png.index(b"IDAT") + 4
    length = int.from_bytes(png[start - 8 : start - 4])
    rows = zlib.decompress(png[start : start + length])
    pixels = torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(2, 1 + 3 * channels)[:, 1:]
    expected = (image * 255).round().to(torch.uint8).permute(1, 2, 0).reshape(2, -1)
    assert torch.equal(pixels, expected)
    assert int.from_bytes(png[16:20]) == 3  # width
    enlarged = base64.b64decode(png_data_uri(image).split(",")[1])
    assert int.from_bytes(enlarged[16:20]) == 96
    with pytest.raises(ValueError, match="expected an image"):
        png_data_uri(torch.zeros(2, 4, 4))


# --- diffusers -----------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def small_clip(projected: bool):
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    words = [*LETTERS, *[f"{c}</w>" for c in LETTERS], "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(config), tokenizer


def small_vae(levels: int):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def stable_diffusion_3():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
    )
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        small_vae(2),
        *small_clip(True),
        *small_clip(True),
        None,
        None,
    )


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), *[(c, -1.0) for c in "▁" + LETTERS]]
    tokenizer = T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=512)
    sizes = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        small_vae(2),
        *small_clip(False),
        T5EncoderModel(sizes),
        tokenizer,
        transformer,
    )


@pytest.mark.parametrize(
    ("make", "guidance"), [(stable_diffusion_3, 4.5), (stable_diffusion_3, 0.0), (flux, 3.5)]
)
def test_a_diffusers_policy_samples_what_its_pipeline_samples(make, guidance: float):
    pipeline = make()
    policy = diffusers_flow(pipeline, resolution=16, guidance=guidance)
    prompts = ["a cat", "two dogs"]
    latents = deterministic_samples(policy, prompts, 4, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompts,
        height=16,
        width=16,
        guidance_scale=guidance,
        latents=noise,
        output_type="pt",
        num_inference_steps=4,
    ).images
    torch.testing.assert_close(policy.decode(latents), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [stable_diffusion_3, flux])
def test_adapters_train_alone_and_load_back(make, tmp_path: Path):
    pipeline = make()
    policy = diffusers_flow(pipeline, resolution=16, guidance=2.0, adapters=LoraSettings(rank=2))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    policy.freeze_reference()
    x, time = torch.randn(2, *policy.latent_shape), torch.tensor([0.3, 0.8])
    base = policy.velocity(x, time, ["a", "b"])
    loss = base.square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        moved = policy.velocity(x, time, ["a", "b"])
        with policy.reference():
            torch.testing.assert_close(policy.velocity(x, time, ["a", "b"]), base.detach())
    assert (moved - base).abs().max().item() > 1e-3
    assert trained == [name for name, p in policy.named_parameters() if p.requires_grad]
    policy.save(tmp_path)
    fresh = make()
    fresh.load_lora_weights(tmp_path)
    again = diffusers_flow(fresh, resolution=16, guidance=2.0)
    with torch.no_grad():
        torch.testing.assert_close(again.velocity(x, time, ["a", "b"]), moved)


def test_a_pipeline_folder_loads_even_without_its_largest_text_encoder(tmp_path: Path):
    policy = diffusers_flow(stable_diffusion_3(), resolution=16, guidance=2.0)
    policy.save(tmp_path / "sd3")
    again = load_diffusers_flow(str(tmp_path / "sd3"), resolution=16, guidance=2.0, adapters=None)
    x, time = torch.randn(1, *policy.latent_shape), torch.tensor([0.5])
    with torch.no_grad():
        torch.testing.assert_close(again.velocity(x, time, ["a"]), policy.velocity(x, time, ["a"]))


def test_what_is_no_flow_pipeline_is_named(tmp_path: Path):
    options = {"resolution": 16, "guidance": 2.0, "adapters": None}
    with pytest.raises(PostgradError, match=r"no model_index\.json"):
        load_diffusers_flow(str(tmp_path), **options)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(PostgradError, match="cannot load the diffusers model 'someone/nothing'"):
        load_diffusers_flow("someone/nothing", **options)
    with pytest.raises(PostgradError, match="found a Linear"):
        diffusers_flow(nn.Linear(1, 1), resolution=16, guidance=2.0)
    pipeline = stable_diffusion_3()
    with pytest.raises(PostgradError, match="multiples of 4 pixels, got 18"):
        diffusers_flow(pipeline, resolution=18, guidance=2.0)
    with pytest.raises(PostgradError, match=r"lora.targets: no linear layer .* called 'to_x'"):
        diffusers_flow(
            pipeline, resolution=16, guidance=2.0, adapters=LoraSettings(targets=["to_q", "to_x"])
        )
