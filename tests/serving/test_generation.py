"""Loading any model by name, and its answers."""

from __future__ import annotations

import json
import math

import pytest

import sparsecraft as sc
from sparsecraft.checkpoint.load import load_any
from sparsecraft.data.encoding import prompt_ids
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer, task_of
from sparsecraft.errors import CheckpointError, DataError, HubError, SparsecraftError
from sparsecraft.serving.generation import answer, load_generator
from tests import cases, tiny

ASKS = [{"role": "user", "content": "say red"}]


@pytest.fixture
def dense(tmp_path):
    return tmp_path / "dense", tiny.save_dense(tmp_path / "dense")


def test_dense_models_and_checkpoints_answer_alike(dense, tmp_path):
    folder, name = dense
    model = hub.load_dense(name)
    sc.convert(model, sc.recipes.camelidae(num_experts=4, adapter_dim=16, lora_rank=4))
    sc.save(model, tmp_path / "converted")
    answers = [
        answer(*load_generator(str(path)), ASKS, max_new_tokens=5)
        for path in (folder, tmp_path / "converted")
    ]
    assert answers[0] == answers[1]
    assert load_any(str(tmp_path / "converted"))[0].sparsecraft.recipe


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_a_missing_tokenizer_is_one_sentence(dense, left):
    folder, name = dense
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    for file in left:  # transformers makes an empty tokenizer of it
        (folder / file).write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(SparsecraftError, match=r"has (no|a) tokenizer.*; copy") as raised:
        load_generator(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{ torn", "[]"])
def test_a_broken_tokenizer_is_one_sentence(dense, file, content):
    folder, name = dense
    (folder / file).write_text(content)
    for load in (load_tokenizer, load_generator):
        with pytest.raises(HubError, match=r"okenizer.* (cannot be read|holds \[\])") as raised:
            load(name)
        assert "\n" not in str(raised.value)


def test_a_broken_image_processor_is_one_sentence(tmp_path):
    cases.dense("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{ torn")
    with pytest.raises(HubError, match=r"preprocessor_config.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_checkpoint_without_its_recipe_says_so(dense, tmp_path):
    model = hub.load_dense(dense[1])
    sc.convert(model, sc.recipes.camelidae(num_experts=4, adapter_dim=16, lora_rank=4))
    out = tmp_path / "converted"
    sc.save(model, out)
    (out / "recipe.json").unlink()
    with pytest.raises(CheckpointError, match=r"converted is a .*recipe\.json is missing"):
        load_any(str(out))


@pytest.mark.parametrize("temperature", [-0.5, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature):
    with pytest.raises(SparsecraftError, match=f"temperature is {temperature};"):
        answer(tiny.llama(), tiny.tokenizer(), ASKS, temperature=temperature)


@pytest.mark.parametrize("count", [0, -1])
def test_answers_of_no_token_are_refused(count):
    with pytest.raises(SparsecraftError, match=f"max_new_tokens is {count};"):
        answer(tiny.llama(), tiny.tokenizer(), ASKS, max_new_tokens=count)


def test_answers_end_where_the_positions_do():
    model = cases.dense("gpt2")
    model.resize_token_embeddings(len(tiny.tokenizer()))
    model.generation_config.eos_token_id = None
    made = []
    generate = model.generate
    model.generate = lambda *a, **k: made.append(generate(*a, **k)) or made[-1]
    answer(model, tiny.tokenizer(), ASKS, max_new_tokens=1000)
    answer(model, tiny.tokenizer(), ASKS, max_new_tokens=3)
    prompt = len(prompt_ids(ASKS, tiny.tokenizer()))
    assert [output.shape[1] for output in made] == [cases.POSITIONS, prompt + 3]
    long = [{"role": "user", "content": "say red " * 60}]
    with pytest.raises(DataError, match=r"GPT2LMHeadModel has 64 positions.*shorten"):
        answer(model, tiny.tokenizer(), long)


def test_models_without_a_bound_are_not_capped():
    model = cases.dense("t5")
    model.resize_token_embeddings(len(tiny.tokenizer()))
    assert isinstance(answer(model, tiny.tokenizer(), ASKS, max_new_tokens=4), str)


def test_task_of_a_model_in_memory():
    assert task_of(tiny.llama()) == "causal"
    tasks = {name: task_of(cases.dense(name)) for name in ("t5", "bert", "vit")}
    assert tasks == {"t5": "seq2seq", "bert": "encoder", "vit": "image"}
