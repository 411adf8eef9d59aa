"""Verifiers, the user's own reward functions, and every way in which they can go wrong."""

import math
import sys
import threading

import numpy
import pytest
import torch

from postgrad.errors import PostgradError
from postgrad.rewards import load_rewards


def scores(spec, completions, prompts=None, **columns):
    return load_rewards(spec)(prompts or ["p"] * len(completions), completions, columns)[0]


def test_exact():
    assert scores("exact", [" 42\n", "43", "x 42"], answer=["42"] * 3) == [1, 0, 0]
    spec = {"name": "exact", "ignore_case": True}
    assert scores(spec, ["YES"], answer=["yes"]) == [1]
    assert scores("exact", ["YES"], answer=["yes"]) == [0]


@pytest.mark.parametrize(
    ("completion", "answer", "same"),
    [
        ("16 - 3 - 4 = 9, so 9 * 2 = $18.", "9 * 2 = 18\n#### 18", True),
        ("The total is 1,234,567.50 dollars", "1234567.5", True),
        ("#### 12 (which took 3 steps)", "12", True),
        (r"So \boxed{7}, after 8 tries.", "7", True),
        (r"first \boxed{1} then \boxed{2}", "2", True),
        (r"\boxed{1{,}000}, no: 1,000", "1000", True),
        ("7-3", "3", True),
        ("it is -3", "-3", True),
        ("it is −3", "-3", True),
        ("it is .5", "0.5", True),
        ("1.5e3", 1500, True),
        ("18.0", 18, True),
        ("17", "18", False),
        ("18 of 20", "18", False),
        ("I do not know", "18", False),
        ("", "0", False),
        ("0.30000000001", 0.3, True),
        ("1,2,3", "3", True),
    ],
)
def test_numeric(completion, answer, same):
    assert scores("numeric", [completion], answer=[answer]) == [float(same)]


def test_numeric_tolerance_and_answers_without_a_number():
    assert scores({"name": "numeric", "tolerance": 0.1}, ["105"], answer=["100"]) == [1]
    with pytest.raises(PostgradError, match="the answer 'many' holds no number"):
        scores("numeric", ["1"], answer=["many"])


def test_math_verify():
    completions = [r"so $\frac{1}{2}$", r"\boxed{0.5}", r"$x^2 + 2x + 1$", "none"]
    answers = ["1/2", r"$\frac{1}{2}$", "$(x+1)^2$", "2"]
    assert scores("math-verify", completions, answer=answers) == [1, 1, 1, 0]


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(PostgradError, match=r"'math-verify'.*postgrad\[tasks\]"):
        load_rewards("math-verify")


def test_addition_needs_no_answer():
    prompts = ["007+015=", "999+999=", "007+015="]
    assert scores("addition", ["2200", "8991", "0022"], prompts) == [1, 1, 0]
    with pytest.raises(PostgradError, match="expected a prompt such as '012\\+345=', got 'hi'"):
        scores("addition", ["1"], ["hi"])


def test_format():
    good, bad = "<think>a\nb</think>\n<answer>c</answer>", "<answer>c</answer>"
    assert scores("format", [good, bad]) == [1, 0]
    assert scores({"name": "format", "pattern": r"\d+\."}, ["12.", "12. x"]) == [1, 0]
    with pytest.raises(PostgradError, match="pattern '\\(' is invalid"):
        load_rewards({"name": "format", "pattern": "("})


def test_length_beyond_a_target():
    spec = {"name": "length", "target": 4, "unit": "characters"}
    completions = ["", "1234", "123456", "12345678", "1234567890"]
    assert scores(spec, completions) == [0, 0, -0.5, -1, -1]
    words = {"name": "length", "target": 2, "unit": "words"}
    assert scores(words, ["one two three"]) == [-0.5]


def test_soft_overlong_punishment_of_dapo():
    # eq. 13: 0 up to L_max - L_cache, then ((L_max - L_cache) - |y|) / L_cache, then -1
    spec = {"name": "length", "form": "overlong", "target": 20, "buffer": 4}
    ids = [[0] * n for n in (16, 17, 18, 20, 21, 90)]
    rewards = scores(spec, ["x"] * 6, completion_ids=ids)
    assert rewards == [0, -0.25, -0.5, -1, -1, -1]
    with pytest.raises(PostgradError, match="needs the column 'completion_ids'"):
        scores(spec, ["x"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numerc", "unknown reward 'numerc': did you mean 'numeric'"),
        ({"name": "numeric", "tolerence": 1}, "'tolerence': did you mean 'tolerance'"),
        ({"name": "numeric", "tolerance": -1}, "tolerance must be at least 0"),
        ({"name": "length"}, "reward 'length' needs the setting 'target'"),
        ({"name": "length", "target": 0}, "target must be a positive integer"),
        ({"name": "length", "target": 9, "form": "overlong"}, "needs a buffer from 1 to 9"),
        ({"name": "length", "target": 9, "form": "over"}, "did you mean 'overlong'"),
        ({"name": "length", "target": 9, "unit": "token"}, "did you mean 'tokens'"),
        ({"name": "numeric", "weight": "heavy"}, "weight must be a finite number, got 'heavy'"),
        ({"name": "numeric", "weight": math.inf}, "weight must be a finite number, got inf"),
        ("numeric*x", "weight must be a finite number, got 'x'"),
        ({"weight": 1}, "expected a name or a mapping with a name"),
        ([3], "expected a name or a mapping with a name, got 3"),
        ([], "no reward function given"),
        (["exact", "exact*2"], "reward 'exact' is listed 2 times"),
        ("no_such_module_here:score", "no module no_such_module_here"),
        ("nowhere.py:score", "no such file nowhere.py"),
        ("math:sqroot", "unknown function of math 'sqroot': did you mean 'sqrt'"),
        ("math:pi", "pi is of type float, not a function"),
    ],
)
def test_specifications_that_are_refused(spec, message):
    with pytest.raises(PostgradError, match=message) as caught:
        load_rewards(spec)
    assert "\n" not in str(caught.value)


def test_time_limit_must_be_positive():
    with pytest.raises(PostgradError, match="time limit must be above 0"):
        load_rewards("exact", time_limit=0)


def test_weighted_sum_and_unweighted_terms():
    specs = ["exact*2", {"name": "format", "weight": -0.5, "pattern": ".*"}]
    total, terms = load_rewards(specs)(["p"] * 2, ["a", "b"], {"answer": ["a", "a"]})
    assert total == [1.5, -0.5]
    assert terms == {"exact": [1, 0], "format": [1, 1]}


USER_CODE = """
import json

import beside

FACTOR = beside.FACTOR

def length(completions, **kwargs):
    return [FACTOR * len(completion) for completion in completions]

def against(prompts, completions, answer, scale=1.0):
    return [scale * (p + a == c) for p, c, a in zip(prompts, completions, answer)]

def raises(completions, **kwargs):
    inner = json.loads("{")
    return inner

class Judge:
    def __call__(self, completions, **kwargs):
        raise RuntimeError("two\\nlines")

judge = Judge()
"""


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    (tmp_path / "own_rewards.py").write_text(USER_CODE)
    (tmp_path / "broken_syntax.py").write_text("def f(:\n")
    (tmp_path / "broken_import.py").write_text("import math\n\nmath.sqrt(-1)\n")
    return tmp_path


def test_the_users_functions_from_file_and_module(user_file):
    for place in ("own_rewards.py", "own_rewards", str(user_file / "own_rewards.py")):
        assert scores(f"{place}:length", ["ab", ""]) == [4, 0]
    spec = {"name": "own_rewards.py:against", "scale": 3, "weight": 0.5}
    total, terms = load_rewards(spec)(["p", "q"], ["pa", "x"], {"answer": ["a", "b"], "id": [1, 2]})
    assert total == [1.5, 0]
    assert terms == {"own_rewards.py:against": [3, 0]}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_rewards.py:lenth", "unknown function of own_rewards.py 'lenth'.*'length'"),
        ("own_rewards.py:FACTOR", "FACTOR is of type int, not a function"),
        ("broken_syntax.py:f", r"importing broken_syntax.py raised SyntaxError: .*, line 1\)"),
        ("broken_import:f", r"raised ValueError: .* \(broken_import.py, line 3\)"),
        ({"name": "own_rewards.py:against", "scal": 1}, "'scal': did you mean 'scale'"),
    ],
)
def test_user_code_that_cannot_be_loaded(user_file, spec, message):
    with pytest.raises(PostgradError, match=message) as caught:
        load_rewards(spec)
    assert "\n" not in str(caught.value)


def test_an_exception_names_the_users_line(user_file):
    with pytest.raises(PostgradError) as caught:
        scores("own_rewards.py:raises", ["a"])
    line = USER_CODE.splitlines().index('    inner = json.loads("{")') + 1
    message = str(caught.value)
    assert message.startswith("reward 'own_rewards.py:raises' raised JSONDecodeError: Expecting")
    assert message.endswith(f"(own_rewards.py, line {line})")
    with pytest.raises(PostgradError, match=r"raised RuntimeError: two lines \(own_rewards.py"):
        scores("own_rewards.py:judge", ["a"])


def test_a_missing_column_is_named_with_those_present(user_file):
    with pytest.raises(PostgradError, match="needs the column 'answer'; the data has the columns "):
        load_rewards("own_rewards.py:against").probe({"prompt": "p", "solution": "s"})
    with pytest.raises(PostgradError, match=r"needs the column 'answer'.* solution, level"):
        scores("exact", ["a"], solution=["s"], level=[1])
    with pytest.raises(PostgradError, match=r"needs the column 'answer'.* prompt only"):
        scores("exact", ["a"])


class Numbers:
    """A reward function that returns what it was given."""

    def __init__(self, returned):
        self.returned = returned

    def __call__(self, prompts, completions):
        return self.returned


WRONG = {
    "count": ([1.0], "returned 1 values for 2 completions"),
    "None": (None, "returned None, expected a list of 2 numbers"),
    "None inside": ([1.0, None], "returned None for completion 2"),
    "NaN": ([math.nan, 1.0], "returned nan for completion 1, expected a finite number"),
    "infinite": ([1.0, -math.inf], "returned -inf for completion 2"),
    "string": ("good", r"returned 'good' \(str\), expected a list"),
    "string inside": ([1.0, "1"], r"returned '1' \(str\) for completion 2"),
    "one number": (0.5, "returned 0.5, expected a list of 2"),
    "list inside": ([1.0, [1.0]], r"returned \[1.0\] \(list\) for completion 2"),
    "tensor of NaN": (torch.tensor([1.0, math.nan]), "returned nan for completion 2"),
    "mapping": ({"a": 1, "b": 2}, r"\(dict\), expected a list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_returns(case):
    returned, message = WRONG[case]
    rewards = load_rewards(Numbers(returned))
    with pytest.raises(PostgradError, match=message) as caught:
        rewards(["p", "q"], ["a", "b"], {})
    assert str(caught.value).startswith("reward 'Numbers' returned")
    with pytest.raises(PostgradError, match=message):
        rewards.probe({"prompt": "p"})


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (True, 0.5),
        numpy.array([1.0, 0.5], dtype=numpy.float32),
        torch.tensor([1.0, 0.5]),
        [torch.tensor(1.0), numpy.float32(0.5)],
    ],
)
def test_right_returns(returned):
    total, _ = load_rewards(Numbers(returned))(["p", "q"], ["a", "b"], {})
    assert total == [1.0, 0.5]
    assert [type(value) for value in total] == [float, float]


def test_the_probe_finds_a_function_that_always_returns_one_value():
    rewards = load_rewards(Numbers([1.0]))
    assert rewards(["p"], ["a"], {})[0] == [1.0]
    with pytest.raises(PostgradError, match="returned 1 values for 2 completions"):
        rewards.probe({"prompt": "p"})


def test_a_hang_ends_at_the_limit():
    release = threading.Event()

    def hangs(completions):
        release.wait()
        return [0.0] * len(completions)

    rewards = load_rewards([hangs], time_limit=0.05)
    with pytest.raises(PostgradError, match=r"'hangs' did not return within its limit of 0\.05 s"):
        rewards.probe({"prompt": "p"})
    release.set()
    assert load_rewards([hangs], time_limit=30)(["p"], ["a"], {})[0] == [0.0]


def test_leaving_the_program_is_an_error_too():
    def leaves(completions):
        raise SystemExit(3)

    with pytest.raises(PostgradError, match="'leaves' raised SystemExit: 3"):
        load_rewards(leaves)(["p"], ["a"], {})


def test_functions_see_prompts_as_they_are_and_completions_as_text():
    seen = {}

    def looks(prompts, completions, answer, **rest):
        seen.update(prompts=prompts, completions=completions, answer=answer, rest=rest)
        return [0.0] * len(prompts)

    talk = [{"role": "user", "content": "hi"}]
    load_rewards(looks)([talk], ["ho"], {"answer": [1], "level": [2]})
    assert seen == {
        "prompts": [talk], "completions": ["ho"], "answer": [1], "rest": {"level": [2]},
    }  # fmt: skip
    assert load_rewards(looks).probe({"prompt": talk, "answer": 1}) == {"looks": 0.0}
    assert seen["completions"] == ["1", "1"]
