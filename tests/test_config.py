import pytest

from postgrad.config import (
    LoopSettings,
    Settings,
    flat,
    merge,
    parse_overrides,
    parse_value,
    read_yaml,
    resolve,
    setting,
)
from postgrad.errors import PostgradError


class Inner(Settings):
    rank: int = setting(4, "rank", gt=0)
    alpha: int = setting(8, "scale", gt=0)


class Outer(Settings):
    beta: float = setting(0.1, "strength", gt=0)
    name: str = setting("a", "name")
    inner: Inner = setting(Inner(), "inner")
    size: int | None = setting(None, "size", gt=0)


def resolved(*words, recipe=None):
    return resolve(Outer, recipe or {}, parse_overrides(words))


def test_values_are_read_as_people_write_them():
    assert parse_value("1e-6") == 1e-6
    assert parse_value("3") == 3
    assert parse_value("true") is True
    assert parse_value("[1, 2]") == [1, 2]
    assert parse_value("null") is None
    assert parse_value("a b") == "a b"
    assert parse_value("yes") == "yes"
    assert parse_value("-2.5E+3") == -2500.0


def test_keys_go_to_the_loop_or_to_the_method():
    loop, own = resolved("beta=0.5", "learning_rate=1e-4", "inner.rank=8")
    assert (loop.learning_rate, own.beta, own.inner.rank) == (1e-4, 0.5, 8)


def test_later_layers_win_and_the_recipe_is_the_first():
    loop, _ = resolve(Outer, {"steps": 3, "seed": 1}, {"steps": 5})
    assert (loop.steps, loop.seed) == (5, 1)


def test_a_part_given_in_part_keeps_the_rest_of_the_methods_own_default():
    class Own(Outer):
        inner: Inner = setting(Inner(rank=16, alpha=32), "inner")

    for given in ({"inner": {"alpha": 1}}, parse_overrides(["inner.alpha=1"])):
        _, own = resolve(Own, {}, given)
        assert (own.inner.rank, own.inner.alpha) == (16, 1)


def test_a_name_and_its_details_go_together():
    assert merge({"data": "file.jsonl"}, {"data": {"split": "test"}}) == {
        "data": {"name": "file.jsonl", "split": "test"}
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["betta=1"], "unknown key 'betta': did you mean 'beta'?"),
        (["rank=3"], "unknown key 'rank': did you mean 'inner.rank'?"),
        (["inner.rnk=3"], "unknown key 'inner.rnk'|unknown key 'rnk'"),
        (["learning_rat=3"], "did you mean 'learning_rate'?"),
        (["beta=0"], "beta: input should be greater than 0, got 0"),
        (["beta=abc"], "beta: .*valid number.*'abc'"),
        (["beta=true"], "beta: expected a number, got True"),
        (["beta=.nan"], "beta: expected a finite number"),
        (["inner.rank=0"], r"inner\.rank: input should be greater than 0"),
        (["steps=1.5"], "steps: .*integer"),
        (["size=-1"], "size: .*greater than 0"),
        (["schedule=cosinus"], "schedule: .*'cosine'"),
        (["beta"], "expected key=value, got 'beta'"),
        (["beta=[1"], "not valid YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(words, message):
    with pytest.raises(PostgradError, match=message) as caught:
        resolved(*words)
    assert "\n" not in str(caught.value)


def test_configuration_files(tmp_path):
    good = tmp_path / "good.yaml"
    good.write_text("beta: 0.3\n")
    assert read_yaml(good) == {"beta": 0.3}
    for name, text in [
        ("bad.yaml", "beta: [1"),
        ("list.yaml", "- 1"),
        ("py.yaml", "!!python/name:os.system"),
    ]:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(PostgradError, match=name) as caught:
            read_yaml(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(PostgradError, match="does not exist"):
        read_yaml(tmp_path / "absent.yaml")


def test_a_dumped_configuration_resolves_to_itself():
    loop, own = resolved("beta=0.5", "inner.rank=8", "steps=7")
    again = resolve(Outer, {}, {**loop.model_dump(mode="json"), **own.model_dump(mode="json")})
    assert again == (loop, own)


def test_defaults_are_not_shared_between_objects():
    one, other = LoopSettings(), LoopSettings()
    one.log.append("wandb")
    assert other.log == ["tensorboard"]
    assert flat(Outer())["inner.rank"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "the key 'steps' stands twice"),
        ("inner: {rank: 1, rank: 2}\n", "the key 'rank' stands twice"),
        ("steps: !!int ''\n", "not a value of the type int"),
        ("beta: !!float x\n", "not a value of the type float"),
        ("beta: !!timestamp x\n", "not a value of the type timestamp"),
        ("steps: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(PostgradError, match=message):
        read_yaml(file)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(PostgradError, match="size: ") as raised:
        resolved("size=" + "x" * 10_000)
    assert len(str(raised.value)) < 300
