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


def test_common_settings_go_to_the_methods_that_have_them(tmp_path):
    settings = {
        **ROWS,
        "batch_size": 4,
        "rollout": {"samples": 2, "max_new_tokens": 3},
        "frontier": {"reward": "exact", "temperature": 0.0, "max_new_tokens": 3},
    }
    table, _ = compare(["sft", "grpo"], budget=16, output=tmp_path, **settings)
    assert table.splitlines()[0].split() == ["method", "reward", "length"]
    with pytest.raises(PostgradError, match="unknown key 'rolout': did you mean 'rollout'"):
        compare(["sft", "grpo"], budget=16, output=tmp_path, **settings, rolout=1)
    with pytest.raises(PostgradError, match="unknown key 'rollout'"):
        compare(["sft"], budget=16, output=tmp_path, **settings)


def test_a_method_is_compared_with_itself_under_other_settings(tmp_path):
    names = ["grpo", "grpo:advantage=centred,mask.clip_high=0.28"]
    settings = {**ROWS, "batch_size": 2, "rollout": {"samples": 2, "max_new_tokens": 3}}
    table, page = compare(names, budget=8, output=tmp_path, **settings)
    assert [line.split()[0] for line in table.splitlines()[1:]] == names
    text = page.read_text(encoding="utf-8")
    assert "grpo:advantage=centred,mask.clip_high=0.28" in text
    runs = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert runs == ["grpo-advantage=centred-mask.clip_high=0.28-seed0", "grpo-seed0"]
    written = (tmp_path / runs[0] / "config.yaml").read_text(encoding="utf-8")
    assert "name: centred" in written
    assert "clip_high: 0.28" in written
    with pytest.raises(PostgradError, match="advantage: unknown advantage 'centered': did you"):
        compare(["grpo:advantage=centered"], budget=8, output=tmp_path / "other", **settings)


def test_a_method_whose_samples_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(PostgradError, match="ppo: cannot count its samples"):
        compare(["ppo"], budget=32, output=tmp_path, environment="CartPole-v1")
