"""A reward model used by name as a reward, and noise put into pairs."""

import json

import pytest
import torch

from language_runs import SMALL, write_rows
from postgrad import inspection
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.data import DataSettings, find_data
from postgrad.methods.language.preference.dpo import DPO
from postgrad.models.language import load_policy
from postgrad.models.scalar import ScalarModel, load_scalar
from postgrad.rewards import load_rewards
from postgrad.rewards.learned import LearnedReward, learned_reward
from postgrad.tasks import Examples

PAIRS = [{"prompt": f"n {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(200)]


def reward_model(trained_on_turns=None):
    model = ScalarModel.on_body_of(load_policy("tiny"))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    if trained_on_turns is not None:
        model.prompts_as_turns = trained_on_turns
    return model


@pytest.fixture
def folder(tmp_path):
    reward_model(trained_on_turns=False).save(tmp_path / "runs" / "rm" / "model")
    return tmp_path / "runs" / "rm" / "model"


def expected(model, prompt, completion):
    with torch.no_grad():
        found = model.rewards([model.render(prompt)], [model.encode_response(completion)])
    return pytest.approx(float(found), rel=1e-5, abs=1e-5)


def test_a_folder_names_its_reward(folder):
    model = load_scalar(str(folder))
    prompts, completions = ["2+2=", "hello", "2+2="], ["4", " you", "five, I think"]
    for spec in (str(folder), {"name": "reward-model", "model": str(folder)}):
        total, terms = load_rewards(spec)(prompts, completions, {})
        assert list(terms) == [str(folder)]
        for value, prompt, completion in zip(total, prompts, completions, strict=True):
            assert value == expected(model, prompt, completion)
    half, _ = load_rewards({"name": str(folder), "weight": 0.5})(prompts, completions, {})
    assert half == pytest.approx([value / 2 for value in total])
    assert load_rewards(f"{folder}*0.5")(prompts, completions, {})[0] == pytest.approx(half)


def test_scores_do_not_depend_on_the_micro_batches(folder, monkeypatch):
    reward = learned_reward(str(folder))
    prompts = [f"prompt {i}" for i in range(9)]
    whole = reward(prompts, ["answer"] * 9)
    monkeypatch.setattr("postgrad.rewards.learned.SCORING_TOKENS", 40)
    assert reward(prompts, ["answer"] * 9) == pytest.approx(whole, rel=1e-4, abs=1e-5)


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_prompts_are_rendered_as_in_training():
    model = reward_model(trained_on_turns=True)
    model.tokenizer.chat_template = TEMPLATE
    turn = [{"role": "user", "content": "hello"}]
    wrapped = expected(model, turn, "you")
    plain = expected(model, "hello", "you")
    assert LearnedReward(model)(["hello"], ["you"])[0] == wrapped
    assert LearnedReward(model, chat=False)(["hello"], ["you"])[0] == plain
    model.prompts_as_turns = False
    assert LearnedReward(model)(["hello"], ["you"])[0] == plain
    assert LearnedReward(model)([turn], ["you"])[0] == wrapped


def test_a_model_from_elsewhere_reads_its_own_template_to_the_end():
    model = reward_model()
    model.tokenizer.chat_template = TEMPLATE
    ids = model.tokenizer("<user>hello|<assistant>you|").input_ids
    states = model.network.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state
    theirs = model.head(states[:, -1]).item()
    for prompt in ("hello", [{"role": "user", "content": "hello"}]):
        assert LearnedReward(model)([prompt], ["you"])[0] == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{runs}/rn/model", "no such folder of a reward model; did you mean '.*/rm/model'"),
        ("{runs}/rm", "holds no config.json of a reward model .*its folder `model`"),
        ({"name": "{runs}/rm/model", "chatt": True}, "'chatt': did you mean 'chat'"),
        ({"name": "{runs}/rm/model", "chat": True}, "chat is on but .* no chat template"),
        ({"name": "{runs}/rm/model", "precision": "bf61"}, "did you mean 'bf16'"),
        ({"name": "{runs}/rm/model", "device": "gpu"}, "expected cpu or cuda"),
        ({"name": "reward-model"}, "needs the setting 'model'"),
        ("reward-modle", "did you mean 'reward-model'"),
        ("somebody/else", "one of the Hub is {name: reward-model, model: ID}"),
    ],
)
def test_faults(spec, message, folder):
    runs = str(folder.parent.parent)
    spec = json.loads(json.dumps(spec).replace("{runs}", runs))
    with pytest.raises(PostgradError, match=message) as caught:
        load_rewards(spec)
    assert "\n" not in str(caught.value)


def test_a_language_model_is_no_reward_and_a_reward_model_no_policy(tmp_path, folder):
    load_policy("tiny").save(tmp_path / "lm")
    with pytest.raises(PostgradError, match="expected a reward model"):
        load_rewards(str(tmp_path / "lm"))
    with pytest.raises(PostgradError, match="holds a reward model, not a language model"):
        load_policy(str(folder))


def test_messages_need_a_chat_template(folder):
    with pytest.raises(PostgradError, match="no chat template"):
        load_rewards(str(folder))([[{"role": "user", "content": "hi"}]], ["you"], {})


def test_a_policy_learns_from_a_reward_model_by_name(tmp_path, folder):
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}="} for i in range(8)])
    run = train(
        "grpo", data=data, reward=str(folder), steps=1, batch_size=2, output=tmp_path / "run",
        rollout={"samples": 2, "max_new_tokens": 4}, **SMALL,
    )  # fmt: skip
    assert run.finished.step == 1


def test_a_reward_model_is_evaluated_on_pairs(tmp_path, folder):
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS[:20])
    model = load_scalar(str(folder))
    found = inspection.evaluate(str(folder), data, 10)
    gaps = []
    for row in PAIRS[:10]:
        prompts = [model.render(row["prompt"])] * 2
        responses = [model.encode_response(row[side]) for side in ("chosen", "rejected")]
        one, other = model.rewards(prompts, responses).tolist()
        gaps.append(one - other)
    assert found["margin"] == pytest.approx(sum(gaps) / 10, abs=1e-4)
    assert found["accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / 10)


# Noise ---------------------------------------------------------------------------------------


def pairs_with(rate, seed=0, formats="preferences", rows=PAIRS):
    settings = DataSettings(name="pairs", flip_rate=rate)
    return find_data(settings, Place(seed), formats, Examples.from_rows(rows))


def test_pairs_are_flipped_at_the_rate_and_by_the_seed():
    found = pairs_with(0.2)
    flipped = [row["flipped"] for row in found]
    assert 0.12 < sum(flipped) / len(flipped) < 0.28
    for row, clean, turned in zip(found, PAIRS, flipped, strict=True):
        assert row["chosen"] == clean["rejected" if turned else "chosen"]
        assert row["rejected"] == clean["chosen" if turned else "rejected"]
    assert [row["flipped"] for row in pairs_with(0.2)] == flipped
    assert [row["flipped"] for row in pairs_with(0.2, seed=1)] != flipped
    assert [row["flipped"] for row in pairs_with(0.2, rows=PAIRS[:50])] == flipped[:50]
    assert "flipped" not in pairs_with(0.0).columns


def test_scores_stay_at_their_places():
    rows = [{**row, "score_chosen": 2.0, "score_rejected": 1.0} for row in PAIRS]
    found = pairs_with(0.4, rows=rows)
    assert {(row["score_chosen"], row["score_rejected"]) for row in found} == {(2.0, 1.0)}


def test_lists_and_labels_made_of_pairs_are_flipped_too():
    flipped = [row["flipped"] for row in pairs_with(0.3)]
    lists = pairs_with(0.3, formats="rankings")
    assert [row["responses"][0].startswith("no") for row in lists] == flipped
    labels = pairs_with(0.3, formats="labelled")
    assert [row["completion"].startswith("no") for row in labels if row["label"]] == flipped


def test_every_preference_method_trains_on_flipped_pairs():
    config = {"model": "tiny", "batch_size": 8, "data": {"name": "pairs", "flip_rate": 0.3}}
    held_out = PAIRS[:20]
    method = DPO(validated(DPO.Config, config), Place(), data=PAIRS, eval_data=held_out)
    flipped = [row["flipped"] for row in pairs_with(0.3)]
    batch = method.data.batch(torch.arange(len(PAIRS)))
    chosen = [method.policy.decode(responses[0]) for responses in batch.responses]
    assert [text.strip().startswith("no") for text in chosen] == flipped
    assert [row["chosen"] for row in method.held_out.examples] == [r["chosen"] for r in held_out]


def test_the_test_split_is_not_flipped():
    config = {"model": "tiny", "max_response_tokens": 32, "eval_size": 4}
    config["data"] = {"name": "docstrings", "limit": 40, "flip_rate": 0.3}
    method = DPO(validated(DPO.Config, config), Place())
    assert any(row["flipped"] for row in method.data.examples)
    assert "flipped" not in method.held_out.examples.columns


@pytest.mark.parametrize(
    ("slug", "rows", "rate", "message"),
    [
        ("dpo", PAIRS, 0.5, "data.flip_rate: .*less than 0.5"),
        ("dpo", PAIRS, -0.1, "data.flip_rate: .*greater than or equal to 0"),
        ("sft", PAIRS, 0.2, "data.flip_rate: only labels of pairs .* reads demonstrations"),
        (
            "lipo",
            [{"prompt": "a", "responses": ["b", "c", "d"], "scores": [3, 2, 1]}] * 4,
            0.2,
            "data.flip_rate: only pairs .* holds rankings",
        ),
    ],
)
def test_noise_that_is_refused(slug, rows, rate, message, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(PostgradError, match=message) as caught:
        train(slug, data={"name": data, "flip_rate": rate}, output=tmp_path / "run", **SMALL)
    assert "\n" not in str(caught.value)
