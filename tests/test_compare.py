"""Several methods on the same data, samples and seeds."""

import pytest

from postgrad import compare
from postgrad.errors import PostgradError

ROWS = {"data": {"name": "addition", "settings": {"size": 16}}, "model": "tiny", "eval_size": 4}


def test_every_method_gets_the_same_number_of_samples(tmp_path):
    settings = {**ROWS, "batch_size": 4}
    table, page = compare(["sft", "grpo"], budget=32, output=tmp_path, seeds=1, **settings)
    assert [line.split()[0] for line in table.splitlines()] == ["method", "sft", "grpo"]
    assert page.is_file()
    runs = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert runs == ["grpo-seed0", "sft-seed0"]

    again, _ = compare(["sft", "grpo"], budget=32, output=tmp_path, seeds=1, **settings)
    assert again == table
    with pytest.raises(PostgradError, match="steps: 8 then, 16 now"):
        compare(["sft", "grpo"], budget=64, output=tmp_path, seeds=1, **settings)


def test_a_method_whose_samples_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(PostgradError, match="ppo: cannot count its samples"):
        compare(["ppo"], budget=32, output=tmp_path, environment="CartPole-v1")
