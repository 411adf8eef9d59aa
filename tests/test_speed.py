"""`postgrad bench`: what it measures, and what it says of wrong settings."""

import json

import pytest
from click.testing import CliRunner

from postgrad.cli import main
from postgrad.speed import SHAPES

SMALL = ["--shape", "tiny", "--prompts", "2", "--completions", "2", "--prompt-tokens", "8"]
SMALL += ["--new-tokens", "4", "--repeats", "1", "--device", "cpu"]


def test_it_measures_updates_and_sampling():
    done = CliRunner().invoke(main, ["bench", *SMALL, "--json"])
    assert done.exit_code == 0, done.output
    speed = json.loads(done.stdout)
    assert speed["update_tokens_per_second"] * speed["update_seconds"] == pytest.approx(
        2 * 8 + 4 * 4
    )
    assert 0 < speed["utilisation"] < 2
    assert 0 < speed["bandwidth"] < 10  # a tiny model lies in the cache
    assert speed["decoded_tokens_per_second"] > 0
    shown = CliRunner().invoke(main, ["bench", *SMALL])
    assert "tokens/s" in shown.stdout


def test_a_wrong_shape_is_named():
    done = CliRunner().invoke(main, ["bench", "--shape", "2b"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "'2b'" in done.stderr


def test_shapes_have_the_size_that_they_are_named_after():
    def parameters(shape):
        attention = 2 * shape.width**2 * (1 + shape.key_heads / shape.heads)
        return shape.layers * (attention + 3 * shape.width * shape.inner) + (
            shape.vocabulary * shape.width
        )

    assert 0.130e9 < parameters(SHAPES["135m"]) < 0.140e9
    assert 1.45e9 < parameters(SHAPES["1.5b"]) < 1.6e9
