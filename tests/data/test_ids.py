"""Tokens and labels that a model has no row or class for: one sentence, at every door."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.data.batches import as_batches
from sparsecraft.data.limits import Limits, pad_id
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.report import describe
from tests import tiny
from tests.surgery.test_budget import RECIPES, made

FAST = {"steps": 1, "batch_size": 2, "max_length": 64, "progress": False, "overwrite": True}
CLASSES = {"num_labels": 2, "pad_token_id": 0}


def larger_tokenizer():
    """The model's, with a padding and another token that it has no rows for."""
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=tiny.CHATML,
    )
    tok.add_special_tokens({"pad_token": "<PAD>"})
    tok.add_tokens(["<tool_call>"])
    return tok


@pytest.fixture
def tok():
    return larger_tokenizer()


def converted(recipe=None):
    model = tiny.llama()
    sc.convert(model, recipe or sc.recipes.camelidae(num_experts=2, adapter_dim=4))
    return model


def classifier():
    config = transformers.LlamaConfig(**tiny.llama().config.to_dict() | CLASSES)
    model = transformers.LlamaForSequenceClassification(config)
    sc.convert(model, sc.recipes.camelidae(num_experts=2, adapter_dim=4))
    return model


def rows(folder, *answers):
    path = folder / "rows.jsonl"
    chats = [{"prompt": "say red", "completion": answer} for answer in answers]
    return tiny.write_rows(path, chats)


def test_padding_without_a_row_never_counts(tmp_path, tok):
    """Packed or not, the loss is what it is with a padding that has a row."""
    path = rows(tmp_path, "red", "red blue green", "one two")
    trained, held_out = [], []
    for tokenizer in (tok, tiny.tokenizer()):
        for packing in (True, False):
            options = FAST | {"packing": packing, "batch_size": 3, "tokenizer": tokenizer}
            trained.append(sc.train(converted(), path, tmp_path / "o", **options).loss)
        found = sc.evaluate(converted(), path, tokenizer=tokenizer)["loss"]
        held_out.append(found[path]["loss"])
    assert trained == pytest.approx([trained[0]] * 4, abs=1e-5)
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-6)
    assert pad_id(tok, tiny.llama()) == tok.eos_token_id < len(tiny.tokenizer()) <= pad_id(tok)


def doors(tok, path, folder):
    calibrated = {"tokenizer": tok, "max_length": 64}
    fitted = lambda: made(converted(split))  # noqa: E731
    split = RECIPES["moefication"]()
    return {
        "train": lambda: sc.train(converted(), path, folder / "o", tokenizer=tok, **FAST),
        "fit": lambda: sc.train(converted(split), path, folder / "o", tokenizer=tok, **FAST),
        "evaluate": lambda: sc.evaluate(converted(), path, tokenizer=tok),
        "convert": lambda: sc.convert(tiny.llama(), sc.recipes.upcycling(2), path, tokenizer=tok),
        "calibrate": lambda: sc.calibrate(fitted(), path, target_flops=0.5, **calibrated),
        "sweep": lambda: sc.sweep(fitted(), path, out=folder / "s", **calibrated),
    }


@pytest.mark.parametrize("door", ["train", "fit", "evaluate", "convert", "calibrate", "sweep"])
def test_a_token_without_a_row_is_named_with_its_line(tmp_path, tok, door):
    path = rows(tmp_path, "red", "<tool_call> blue")
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 2: the token '<tool_call>' \(\d+\) has"
    ):
        doors(tok, path, tmp_path)[door]()
    assert not (tmp_path / "o").exists()


def test_choices_domains_and_batches_are_checked_too(tmp_path, tok):
    row = {"prompt": "say red", "choices": ["red", "<tool_call>"], "answer": 0}
    path = tiny.write_rows(tmp_path / "choices.jsonl", [row])
    with pytest.raises(DataError, match=r"choices\.jsonl, row 1: the token '<tool_call>'"):
        sc.evaluate(converted(), choices=path, tokenizer=tok)
    dense = tiny.save_dense(tmp_path / "dense")
    recipe = sc.recipes.nexus(2, encoder="self")
    options = {"sources": [dense, dense], "tokenizer": tok}
    with pytest.raises(SparsecraftError, match="the token '<tool_call>'"):
        sc.convert(tiny.llama(), recipe, domains=[["say red"], ["<tool_call>"]], **options)
    good = torch.tensor([[1, 2], [3, 4]])
    btx = sc.override(sc.recipes.btx(2), {"router.init": "hidden"})
    mixture, options = tiny.llama(), {"sources": [dense, dense]}
    sc.convert(mixture, recipe, domains=[[good], [good + 4]], **options)
    for bad in (torch.tensor([[1, 320]]), {"input_ids": torch.tensor([[-1, 2]])}):
        for method in (btx, recipe):
            with pytest.raises(DataError, match="batch 2 of data holds the token"):
                sc.convert(tiny.llama(), method, domains=[[good], [good, bad]], **options)
        with pytest.raises(DataError, match="batch 1 of data holds the token"):
            sc.extend(mixture, dense, [bad], base=tiny.llama())
        with pytest.raises(DataError, match="batch 2 of data holds the token"):
            list(as_batches([torch.tensor([[1, 2]]), bad], model=tiny.llama()))
        one = bad["input_ids"][:, :1] if isinstance(bad, dict) else bad[:, 1:]
        with pytest.raises(DataError, match="batch 1 of data holds the token"):
            list(as_batches([one], model=tiny.llama()))
        with pytest.raises(DataError, match="batch 2 of data holds the token"):
            sc.evaluate(converted(), [torch.tensor([[1, 2]]), bad])
    with pytest.raises(DataError, match="batch 1 of data holds the token 400"):
        list(as_batches([{"input_ids": good, "decoder_input_ids": good + 396}], model=tiny.llama()))


def test_labels_beyond_the_classes_are_named_before_the_first_step(tmp_path):
    labelled = [{"text": f"say {word}", "label": i % 2} for i, word in enumerate(tiny.WORDS)]
    path = tiny.write_rows(tmp_path / "good.jsonl", labelled)
    sc.train(classifier(), path, tmp_path / "o", tokenizer=tiny.tokenizer(), **FAST)
    labelled[4]["label"] = 2
    path = tiny.write_rows(tmp_path / "bad.jsonl", labelled)
    for run in (
        lambda: sc.train(classifier(), path, tmp_path / "p", tokenizer=tiny.tokenizer(), **FAST),
        lambda: sc.evaluate(classifier(), path, tokenizer=tiny.tokenizer()),
    ):
        with pytest.raises(DataError, match=r"bad\.jsonl, line 5: the label 2 .* num_labels=2"):
            run()
    assert not (tmp_path / "p").exists()


def test_a_classifier_finds_the_end_of_a_text_by_its_own_padding(tmp_path):
    """Where the tokenizer pads otherwise than the model's configuration says."""
    path = tiny.write_rows(
        tmp_path / "a.jsonl",
        [{"text": "red", "label": 0}, {"text": "red blue green one two", "label": 1}],
    )
    held_out, trained = [], []
    for pad in (0, 3):
        torch.manual_seed(0)
        model = classifier()
        model.config.pad_token_id = pad
        found = sc.evaluate(model, path, tokenizer=tiny.tokenizer())["loss"]
        held_out.append(found[path]["loss"])
        options = FAST | {"learning_rate": 1e-9, "tokenizer": tiny.tokenizer()}
        trained.append(sc.train(model, path, tmp_path / "o", **options).loss)
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-6)
    assert trained[0] == pytest.approx(trained[1], abs=1e-6)


def test_limits_hold_to_the_last_row_and_class(tok):
    limits = Limits(tokens=5, classes=2)
    limits.check({"input_ids": [0, 4], "labels": [-100, 4]}, tok)
    limits.check({"input_ids": [], "labels": 1}, tok)
    for example, words in (
        ({"input_ids": [5], "labels": [0]}, r"\(5\) has no row"),
        ({"input_ids": [0], "labels": [5, 0]}, r"\(5\) has no row"),
        ({"input_ids": [0], "labels": 2}, "labels are 0 to 1"),
    ):
        with pytest.raises(DataError, match=words):
            limits.check(example, tok)
    last = len(tiny.tokenizer()) - 1
    (batch,) = as_batches([torch.tensor([[0, last]])], model=tiny.llama())
    assert batch["input_ids"].tolist() == [[0, last]]
    for ids, named in (([-1, 2], -1), ([1, last + 1], last + 1)):
        with pytest.raises(DataError, match=f"token {named}, and .* rows 0 to {last}"):
            list(as_batches([torch.tensor([ids])], model=tiny.llama()))


@pytest.mark.parametrize(
    ("pad", "eos", "found"), [(0, 2, 0), (5, 2, 5), (None, 2, 2), (-1, 2, 2), (None, None, 0)]
)
def test_the_padding_is_the_tokenizers_its_end_of_text_or_zero(pad, eos, found):
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == found


def test_limits_of_models_without_tokens_or_classes():
    vit = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16, image_size=8, patch_size=4)  # fmt: skip
    assert Limits.of(transformers.ViTForImageClassification(vit)) == Limits()
    assert Limits.of(tiny.llama()) == Limits(tokens=len(tiny.tokenizer()))
    assert Limits.of(classifier()) == Limits(tokens=len(tiny.tokenizer()), classes=2)
    assert Limits.of(None) == Limits()


def test_what_rows_hold_unused_is_in_the_report_and_the_results(tmp_path):
    chats = [row | {"source": "x", "lang": None} for row in tiny.chat_rows(6)]
    path = tiny.write_rows(tmp_path / "a.jsonl", chats)
    model = converted()
    report = sc.train(model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    expected = {path: {"source": 6}}
    assert report.counts["unused_fields"] == expected
    assert f"{path}: fields that were not used, and in how many rows: source (6)" in str(report)
    (stage,) = json.loads((tmp_path / "out" / "report.json").read_text())["training"]
    assert stage["counts"]["unused_fields"] == expected
    assert "source (6)" in "".join(describe(tmp_path / "out"))
    found = sc.evaluate(model, path, tokenizer=tiny.tokenizer())["loss"][path]
    assert found["unused_fields"] == expected
