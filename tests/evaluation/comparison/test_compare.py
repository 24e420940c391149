"""The figures are those of evaluate and count, and one model is in memory at a time."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.checkpoint.load import load_any
from sparsecraft.errors import CheckpointError, DataError, HubError, SparsecraftError
from sparsecraft.evaluation.comparison import compare as module
from sparsecraft.evaluation.comparison import measuring
from sparsecraft.evaluation.comparison.compare import ALL, compare
from tests import tiny


def learned() -> transformers.LlamaForCausalLM:
    """The tiny model after some steps on the rows, so that noise makes it worse."""
    model, tokenizer = tiny.llama().train(), tiny.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in ROWS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(30):
        model(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


ROWS = tiny.chat_rows(40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A trained model, the same elsewhere, the same with noise, and two mixtures made of it."""
    home = tmp_path_factory.mktemp("models")
    model, tokenizer = learned(), tiny.tokenizer()
    for name in ("dense", "again"):
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(home / "worse")
    tokenizer.save_pretrained(home / "worse")
    base = sc.hub.load_dense(str(home / "dense"))
    sc.convert(base, sc.recipes.camelidae(num_experts=4, top_k=2, adapter_dim=8), certify=False)
    sc.save(base, home / "moe")
    return {name: str(home / name) for name in ("dense", "again", "worse", "moe")}


@pytest.fixture
def files(tmp_path) -> list[str]:
    parts = {"a": ROWS[:25], "b": ROWS[15:]}
    return [tiny.write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()]


def test_figures_are_those_of_evaluate_and_count(folders, files):
    names = [folders["dense"], folders["moe"]]
    found = compare(names, files)
    json.dumps(found, allow_nan=False)
    assert [model["name"] for model in found["models"]] == names and not found["interrupted"]
    for name, model in zip(names, found["models"], strict=True):
        loaded, tokenizer = load_any(name)
        wanted = sc.evaluate(loaded, files, tokenizer=tokenizer)["loss"]
        total = sum(wanted[file]["loss"] * wanted[file]["tokens"] for file in files)
        labels = sum(wanted[file]["tokens"] for file in files)
        assert model["loss"][ALL] == pytest.approx(total / labels, rel=1e-6)
        for file in files:
            assert model["loss"][file] == pytest.approx(wanted[file]["loss"], rel=1e-6)
            counts = {"rows": 25, "labels": wanted[file]["tokens"], "dropped": 0}
            assert found["files"][file] == counts
        counted = sc.count(loaded).to_dict()
        assert {key: model[key] for key in counted} == counted
        assert model["bytes"] == 4 * counted["total"] and model["peak_bytes"] is None
    assert found["files"][ALL]["rows"] == 50
    dense, moe = found["models"]
    assert dense["experts"] == dense["experts_per_token"] == [] and dense["difference"] is None
    assert moe["experts"] == [4] and moe["experts_per_token"] == [2]


def test_a_model_and_itself_do_not_differ_and_noise_makes_it_worse(folders, files):
    found = compare([folders["dense"], folders["again"], folders["worse"]], files)
    _, again, worse = found["models"]
    for file in (*files, ALL):
        same = {"difference": 0, "low": 0, "high": 0, "verdict": "the same"}
        assert again["difference"][file] == same
        one = worse["difference"][file]
        assert 0 < one["low"] < one["difference"] < one["high"] and one["verdict"] == "higher"
        gained = worse["loss"][file] - found["models"][0]["loss"][file]
        assert one["difference"] == pytest.approx(gained)


def test_one_model_is_in_memory_at_a_time(folders, files, monkeypatch):
    real, alive = measuring.load_any, []

    def load(name, base):
        assert not [model for model in alive if model() is not None]
        model, tokenizer = real(name, base)
        alive.append(weakref.ref(model))
        return model, tokenizer

    gc.disable()  # what frees it is not chance
    try:
        monkeypatch.setattr(measuring, "load_any", load)
        compare([folders["dense"], folders["moe"], folders["worse"]], files)
    finally:
        gc.enable()
    assert len(alive) == 3


def test_mixtures_of_transformers(folders, files, tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tiny.tokenizer().save_pretrained(tmp_path / "mixtral")
    found = compare([folders["dense"], tmp_path / "mixtral"], files)
    mixture = found["models"][1]
    assert mixture["experts"] == [4] and mixture["experts_per_token"] == [2]
    assert mixture["active"] < mixture["total"]


def test_classifiers_have_an_accuracy(files, tmp_path):
    rows = [{"text": f"say {tiny.WORDS[i % 10]}", "label": i % 3} for i in range(30)]
    data, names = tiny.write_rows(tmp_path / "c.jsonl", rows), []
    for seed in range(2):
        torch.manual_seed(seed)
        config = tiny.llama().config
        config.num_labels = 3
        model = transformers.LlamaForSequenceClassification(config)
        names.append(str(tmp_path / f"classifier{seed}"))
        model.save_pretrained(names[-1])
        tiny.tokenizer().save_pretrained(names[-1])
    found = compare(names, data)
    for name, model in zip(names, found["models"], strict=True):
        loaded, tokenizer = load_any(name)
        wanted = sc.evaluate(loaded, data, tokenizer=tokenizer)["loss"][data]
        assert model["accuracy"][ALL] == pytest.approx(wanted["accuracy"])
        assert model["loss"][ALL] == pytest.approx(wanted["loss"], rel=1e-6)
    tiny.save_dense(tmp_path / "dense")
    with pytest.raises(SparsecraftError, match=r"different tasks \(label, causal\)"):
        compare([names[0], tmp_path / "dense"], data)


def test_encoder_decoders(files, tmp_path):
    names = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = transformers.T5Config(
            vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        names.append(str(tmp_path / f"t5_{seed}"))
        transformers.T5ForConditionalGeneration(config).save_pretrained(names[-1])
        tiny.tokenizer().save_pretrained(names[-1])
    found = compare(names, files)
    for name, model in zip(names, found["models"], strict=True):
        loaded, tokenizer = load_any(name)
        wanted = sc.evaluate(loaded, files, tokenizer=tokenizer)["loss"]
        assert model["loss"][files[0]] == pytest.approx(wanted[files[0]]["loss"], rel=1e-6)
        assert model["tokens_per_second"] > 0


def test_the_shortest_model_says_how_long_rows_may_be(folders, files, tmp_path):
    config = tiny.llama().config
    config.max_position_embeddings = 18
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "short")
    tiny.tokenizer().save_pretrained(tmp_path / "short")
    found = compare([folders["dense"], tmp_path / "short"], files)
    assert found["max_length"] == 18 and found["files"][ALL]["dropped"] > 0
    assert any("left out for all models" in note for note in found["notes"])
    with pytest.raises(DataError, match="18 positions"):
        compare([folders["dense"], tmp_path / "short"], files, max_length=64)


@pytest.mark.parametrize("after", [1, 2])
def test_ctrl_c_keeps_two_models_or_none(after, folders, files, monkeypatch, caplog):
    real, done = module.measure, []

    def measure(*given):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(given)
        return real(*given)

    monkeypatch.setattr(module, "measure", measure)
    names = [folders["dense"], folders["moe"], folders["worse"]]
    if after == 1:
        with pytest.raises(KeyboardInterrupt):
            compare(names, files)
        assert "too few to compare" in caplog.text
    else:
        found = compare(names, files)
        assert len(found["models"]) == 2 and found["interrupted"]
        assert f"Interrupted, and not measured: {folders['worse']}." in found["notes"]


def test_notes_on_few_rows_cut_texts_and_types(folders, tmp_path):
    short = tiny.write_rows(tmp_path / "one.jsonl", ROWS[:1])
    long = tiny.write_rows(tmp_path / "long.jsonl", [{"text": "red blue " * 200}])
    half = tmp_path / "half"
    tiny.llama().bfloat16().save_pretrained(half)
    tiny.tokenizer().save_pretrained(half)
    found = compare([folders["dense"], half], [short, long], max_length=64)
    one = found["models"][1]["difference"][short]
    assert one["low"] is one["high"] is None and one["verdict"] == "of one row"
    notes = " ".join(found["notes"])
    assert f"{short} keeps few rows (1)" in notes and f"Long texts of {long} were cut" in notes
    assert "bfloat16, float32" in notes
    found = compare([folders["dense"], folders["again"]], short)
    assert found["models"][0]["tokens_per_second"] is None
    assert any("one batch" in note for note in found["notes"])


def test_what_is_wrong_is_said_before_a_model_is_measured(folders, files, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measuring, "load_any", never)
    dense, link = folders["dense"], tmp_path / "link"
    link.symlink_to(dense)
    other = tmp_path / "other"
    tiny.llama().save_pretrained(other)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHATML.replace("<|im_end|>", "!<|im_end|>")
    tokenizer.save_pretrained(other)
    bare = tmp_path / "bare"
    tiny.llama().save_pretrained(bare)
    lost = tmp_path / "lost"
    base = sc.hub.load_dense(dense)
    sc.convert(base, sc.recipes.mov(num_experts=2), certify=False)
    sc.save(base, lost)
    (lost / "moe.safetensors").unlink()
    wrong = [
        ([], files, SparsecraftError, "there are none"),
        (dense, files, SparsecraftError, "there is one"),
        ([dense, dense], files, SparsecraftError, "same folder"),
        ([dense, link], files, SparsecraftError, "same folder"),
        ([dense, "./nowhere"], files, HubError, "no model folder './nowhere'"),
        ([dense, lost], files, CheckpointError, "moe.safetensors"),
        ([dense, bare], files, DataError, "no tokenizer"),
        ([dense, other], files, DataError, "as different tokens"),
        ([dense, folders["moe"]], [], DataError, "pass data="),
        ([dense, folders["moe"]], [files[0], files[0]], DataError, "twice"),
        ([dense, folders["moe"]], str(tmp_path / "no.jsonl"), DataError, "no.jsonl"),
    ]
    for models, data, error, words in wrong:
        with pytest.raises(error, match=words):
            compare(models, data)
    for option in ({"limit": 0}, {"max_length": 1}):
        with pytest.raises(SparsecraftError):
            compare([dense, folders["moe"]], files, **option)
    with pytest.raises(SparsecraftError, match="stands on a base"):
        compare([dense, folders["again"]], files, base="x")


def test_rows_that_differ_later_are_refused_too(folders, tmp_path):
    """A tokenizer that reads the first rows alike."""
    rows = [
        *ROWS[:10],
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "zebra"}]},
    ]
    data, other = tiny.write_rows(tmp_path / "a.jsonl", rows), tmp_path / "other"
    tiny.llama().save_pretrained(other)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    model = tiny.llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    with pytest.raises(DataError, match="as different tokens"):
        compare([folders["dense"], other], data)


def test_an_adapter_and_a_base_that_has_moved(folders, files, tmp_path):
    """PEFT folders of ours, and a base for those alone that stand on one."""
    base = sc.hub.load_dense(folders["dense"])
    sc.convert(base, sc.recipes.molora(num_experts=2, rank=2), certify=False)
    sc.export(base, "peft", tmp_path / "adapter")
    alone = sc.load(folders["moe"])
    sc.save(alone, tmp_path / "alone", standalone=True)
    names = [folders["again"], tmp_path / "adapter", tmp_path / "alone", folders["moe"]]
    found = compare(names, files[0], base=folders["dense"])
    assert [len(model["experts"]) for model in found["models"]] == [0, 1, 1, 1]
