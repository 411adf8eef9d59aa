"""iSogCLR and SimCLR: images, views, encoders, training, exact resume, learning, faults."""

import json
import math

import numpy
import pytest
import torch
from PIL import Image

from postgrad import api
from postgrad.claims.base import load_claim
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.representation.isogclr import ISogCLR, ISogCLRSettings
from postgrad.methods.representation.simclr import SimCLR, SimCLRSettings
from postgrad.models.encoders import (
    BagEncoder,
    ImageEncoder,
    ImageShape,
    TextShape,
    hashed_words,
    load_encoder,
    save_encoder,
)
from postgrad.sampling.views import view
from postgrad.tasks.images import Images, load_images

FEW = {"name": "digits", "settings": {"head": 12, "decay": 0.8}}
PAIRS = [
    {"anchor": f"the {word} of things", "positive": f"def {word}(x): return x"}
    for word in ("length", "colour", "weight", "price", "age", "name", "size", "speed")
]


def quick(slug, folder, **settings):
    base = {"steps": 4, "log": [], "report": False, "device": "cpu", "batch_size": 8}
    return api.train(slug, output=str(folder), **{**base, **settings})


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows
    ]


# Images ----------------------------------------------------------------------------------------


def test_digits_have_the_long_tail_of_the_card():
    train, validation, test = (
        load_images("digits", split=s) for s in ("train", "validation", "test")
    )
    assert numpy.bincount(train.labels).tolist() == [round(150 * 0.7**c) for c in range(10)]
    assert len(train) + len(validation) + len(test) == 1797
    assert numpy.bincount(test.labels).min() >= 10
    assert train.pixels.shape[1:] == (1, 8, 8)
    assert train.pixels.min() == 0
    assert train.pixels.max() == 1


def test_digits_on_a_larger_square_are_the_same_digits():
    plain, placed = load_images("digits"), load_images("digits", settings={"size": 11})
    assert placed.pixels.shape == (len(plain), 1, 11, 11)
    assert placed.pixels.sum((1, 2, 3)) == pytest.approx(plain.pixels.sum((1, 2, 3)))
    assert numpy.array_equal(placed.labels, plain.labels)
    assert not numpy.array_equal(placed.pixels[:, :, :8, :8], plain.pixels)


def test_no_training_image_is_held_out():
    train, test = load_images("digits"), load_images("digits", split="test")
    seen = {image.tobytes() for image in train.pixels}
    assert sum(image.tobytes() in seen for image in test.pixels) <= 1  # the data holds few doubles


def test_a_split_depends_on_its_seed_alone_and_the_test_images_on_nothing():
    def drawn(split, seed):
        return load_images("digits", split=split, settings={"split_seed": seed})

    for split in ("train", "validation"):
        assert drawn(split, 0).fingerprint == drawn(split, 0).fingerprint
        assert drawn(split, 0).fingerprint != drawn(split, 1).fingerprint
    assert drawn("test", 0).fingerprint == drawn("test", 1).fingerprint


def test_a_folder_of_images(tmp_path):
    for kind, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        (tmp_path / kind).mkdir()
        for number in range(10):
            Image.new("RGB", (20, 12), colour).save(tmp_path / kind / f"{number}.png")
    train = load_images(str(tmp_path), settings={"size": 16})
    assert train.classes == ("blue", "red")
    assert numpy.bincount(train.labels).tolist() == [8, 8]
    assert train.pixels.shape == (16, 3, 16, 16)
    assert train.pixels[train.labels == 1][0, :, 0, 0] == pytest.approx([250 / 255, 0, 0])
    (tmp_path / "red" / "3.png").write_text("no image")
    with pytest.raises(PostgradError, match=r"3\.png cannot be read"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "did you mean 'data.settings.head'"),
        ({"decay": 0}, "data.settings.decay"),
        ({"decay": "fast"}, "data.settings.decay"),
        ({"head": 1.5}, "data.settings.head"),
        ({"split_seed": -1}, "data.settings.split_seed"),
    ],
)
def test_wrong_image_settings(settings, message):
    with pytest.raises(PostgradError, match=message):
        load_images("digits", settings=settings)


def test_wrong_split_and_folders_without_classes(tmp_path):
    with pytest.raises(PostgradError, match="did you mean 'validation'"):
        load_images("digits", split="valid")
    with pytest.raises(PostgradError, match="at least 2 classes"):
        load_images(str(tmp_path))
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
    with pytest.raises(PostgradError, match="no images"):
        load_images(str(tmp_path))
    Image.new("L", (8, 8)).save(tmp_path / "a" / "one.png")
    with pytest.raises(PostgradError, match="class 'a' has 1 image"):
        load_images(str(tmp_path))


# Views and encoders ------------------------------------------------------------------------------


def test_views_move_by_whole_pixels_and_repeat_the_border():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    seen = set()
    for seed in range(60):
        found = view(image, torch.Generator().manual_seed(seed), shift=1, noise=0)[0, 0]
        expected = {
            (dy, dx): image[0, 0][(torch.arange(4) + dy).clamp(0, 3)][
                :, (torch.arange(4) + dx).clamp(0, 3)
            ]
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        }
        matching = [move for move, moved in expected.items() if torch.equal(moved, found)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) == 9


def test_view_noise_has_its_standard_deviation():
    found = view(torch.zeros(50, 1, 8, 8), torch.Generator().manual_seed(0), shift=2, noise=0.25)
    assert float(found.std()) == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(
    ("encoder", "inputs"),
    [
        (ImageEncoder(ImageShape(3, 10, 4, 8, 5)), torch.rand(2, 3, 10, 10)),
        (BagEncoder(TextShape(100, 5)), ["get an item", "def get_item(x)"]),
    ],
)
def test_encoders_come_back_from_their_folder(tmp_path, encoder, inputs):
    save_encoder(encoder, tmp_path / "model")
    again = load_encoder(tmp_path / "model")
    assert torch.equal(again(inputs), encoder(inputs))
    assert encoder(inputs).shape == (2, 5)


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(PostgradError, match="holds no encoder"):
        load_encoder(tmp_path)


def test_words_of_code_and_language_meet():
    assert hashed_words("getItem", 1000) == hashed_words("get_item", 1000)
    assert hashed_words("Get  item!", 1000) == hashed_words("get item", 1000)
    assert len(hashed_words("HTTPServer2 größe", 1000)) == 4
    assert hashed_words("+-*/", 1000) == []
    # a text without words is a zero vector, not NaN
    assert not BagEncoder(TextShape(10, 4))(["+-", "a"])[0].any()


def test_a_bag_is_the_weighted_mean_of_its_words():
    encoder = BagEncoder(TextShape(50, 3))
    torch.nn.init.normal_(encoder.log_weights)
    words = hashed_words("get the item", 50)
    expected = encoder.log_weights[words].exp() @ encoder.words.weight[words] / 3
    assert torch.allclose(encoder(["other", "get_the_item"])[1], expected, atol=1e-6)


# Methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["isogclr", "simclr"])
@pytest.mark.parametrize("data", [FEW, PAIRS], ids=["images", "texts"])
def test_trains_saves_and_moves_the_encoders(slug, data, tmp_path):
    run = quick(slug, tmp_path / "run", data=data)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    if data is FEW:
        assert 0 < run.evaluation["probe_balanced_accuracy"] <= 1
        encoder = load_encoder(tmp_path / "run" / "model")
        pixels = run.method.source.pixels[:3]
        assert torch.equal(encoder(pixels), run.method.source.encoder(pixels))
    else:
        encoder = load_encoder(tmp_path / "run" / "model")
        assert torch.equal(encoder(["def age(x)"]), run.method.source.encoder(["def age(x)"]))
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"]
    assert ("tau" in sample) == (slug == "isogclr")


@pytest.mark.parametrize("data", [FEW, None], ids=["images", "texts"])
def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path):
    if data is None:
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(map(json.dumps, PAIRS)))
        data = {"name": str(file)}
    settings = {"data": data, "schedule": "constant", "rho": 0.3, "batch_size": 4}
    whole = quick("isogclr", tmp_path / "whole", steps=6, **settings)
    quick("isogclr", tmp_path / "cut", steps=3, **settings)
    resumed = api.resume(tmp_path / "cut", steps=6, allow_changes=True)
    expected = [row for row in rows_of(tmp_path / "whole") if "loss" in row]
    assert [row for row in rows_of(tmp_path / "cut") if "loss" in row] == expected
    for side, state in whole.method.state_dict().items():
        again = resumed.method.state_dict()[side]
        assert all(torch.equal(again[name], value) for name, value in state.items())
        assert len(state["tau"].unique()) > 2
    weights = zip(
        whole.method.source.encoder.parameters(),
        resumed.method.source.encoder.parameters(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in weights)


def test_two_runs_of_one_seed_agree_and_other_seeds_differ(tmp_path):
    first, second, other = (
        quick("simclr", tmp_path / str(i), data=FEW, seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    assert rows_of(first.folder) == rows_of(second.folder) != rows_of(other.folder)


def test_eta_zero_is_sogclr_and_keeps_temperatures(tmp_path):
    run = quick("isogclr", tmp_path / "run", data=FEW, eta=0.0, tau_init=0.2)
    assert torch.equal(run.method.tau(), torch.full_like(run.method.tau(), 0.2))
    assert run.evaluation["tau_frequency_correlation"] == 0
    states = run.method.temperatures["both"]
    assert torch.isfinite(states.log_s).any()


def test_temperatures_stay_in_their_range_and_reach_the_bounds(tmp_path):
    # a large radius lets the adversary be sharp (tau falls), a small one does not (tau rises)
    settings = {"data": FEW, "eta": 3.0, "steps": 45, "tau_min": 0.07, "tau_max": 0.4}
    low = quick("isogclr", tmp_path / "low", rho=3.0, **settings)
    high = quick("isogclr", tmp_path / "high", rho=0.001, **settings)
    assert float(low.method.tau().min()) == pytest.approx(0.07)
    assert float(high.method.tau().max()) == pytest.approx(0.4)
    assert float(low.method.tau().mean()) < 0.1 < float(high.method.tau().mean())


def test_only_visited_samples_change():
    method = ISogCLR(ISogCLRSettings(batch_size=8, data=FEW), Place(0))
    batch = method.collect(0)
    method.loss(batch)
    moved = (method.tau() != 0.1).nonzero().flatten()
    assert moved.tolist() == sorted(batch.index.tolist())


def test_learning_separates_classes(tmp_path):
    data = {"name": "digits", "settings": {"size": 10, "decay": 1.0, "head": 40}}
    run = quick("isogclr", tmp_path / "run", data=data, steps=150, batch_size=64)
    name = "probe_balanced_accuracy"
    before = rows_of(run.folder)[0][f"evaluation/{name}"]
    assert run.evaluation[name] > before + 0.05


@pytest.mark.parametrize("slug", ["isogclr", "simclr"])
def test_learning_pairs_of_texts(slug, tmp_path):
    # no word is common to the two sides, so which belongs to which must be learned
    words = ("length", "colour", "weight", "price", "age", "name", "size", "speed")
    pairs = [{"anchor": f"the {w} of it", "positive": f"def f{w[::-1]}(x)"} for w in words]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    data = {"name": str(tmp_path / "pairs.jsonl")}
    settings = {"rho": 0.5} if slug == "isogclr" else {}
    run = quick(
        slug, tmp_path / "run", data=data, eval_data=data, steps=60, learning_rate=2e-2, **settings
    )
    assert run.evaluation["top1"] == 1
    assert rows_of(run.folder)[0]["evaluation/top1"] < 0.6


def test_bf16_autocast_keeps_similarities_in_float32(tmp_path):
    run = quick("simclr", tmp_path / "run", data=FEW, precision="bf16")
    assert math.isfinite(run.finished.evaluation["probe_balanced_accuracy"])


def test_images_from_python_have_no_test_split():
    images = load_images("digits")
    method = SimCLR(SimCLRSettings(), Place(0), data=images)
    assert method.evaluate() == {}
    assert len(method.source) == len(images)


@pytest.mark.parametrize("arm", ["SimCLR, tau 0.1", "SogCLR, tau 0.1", "iSogCLR, tau from 0.1"])
def test_the_claim_runs_quickly(arm):
    claim = load_claim("isogclr")
    outcome = claim.run(arm, 0, True)
    assert 0 < outcome.values[claim.metric] <= 1
    assert len(outcome.curves[claim.metric]) == 2
    assert ("mean tau by class" in outcome.curves) == arm.startswith("iSogCLR")


# Faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_min": 0.5, "tau_max": 0.2}, "tau_max: expected at least tau_min 0.5"),
        ({"tau_init": 0.01}, r"tau_init: expected in \[0.05, 1.0\]"),
        ({"rho": 9.0}, "rho: expected below"),
        ({"data": {"name": "digits", "limit": 5}}, "data.limit"),
        ({"data": "digts"}, "digts"),
        ({"data": {"name": "digits", "split": "tset"}}, "split"),
    ],
)
def test_wrong_settings_name_their_key(settings, message, tmp_path):
    with pytest.raises(PostgradError, match=message):
        quick("isogclr", tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_and_a_data_set_of_one(tmp_path):
    with pytest.raises(PostgradError, match="batch_size"):
        quick("simclr", tmp_path / "run", batch_size=1)
    with pytest.raises(PostgradError, match="at least 2 samples"):
        quick("simclr", tmp_path / "run", data=PAIRS[:1])


def test_texts_without_a_positive(tmp_path):
    with pytest.raises(PostgradError, match="positive"):
        quick("isogclr", tmp_path / "run", data=[{"anchor": "a"}, {"anchor": "b"}])


def test_held_out_images_of_another_size():
    small = Images("small", numpy.zeros((4, 1, 6, 6), "float32"), numpy.arange(4), tuple("abcd"))
    config = SimCLRSettings(eval_data="digits")
    with pytest.raises(PostgradError, match="eval_data"):
        SimCLR(config, Place(0), data=small)
