"""Held-out loss and rank classification against plain computations."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.data.encoding import encode, encode_pair
from sparsecraft.data.rows import load_rows
from sparsecraft.dense.tokens import positions_of
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.report import edit_lines
from sparsecraft.evaluation.routing import first_choices_E, load_entropy, mutual_information
from sparsecraft.moe.routing import Routing
from tests import cases, tiny


@pytest.fixture(scope="module")
def model():
    model = tiny.llama()
    sc.convert(model, sc.recipes.camelidae(num_experts=4, adapter_dim=16, lora_rank=4))
    cases.randomize_new(model)
    return model


def loss_one_row_at_a_time(model, rows) -> tuple[float, int]:
    total, count = 0.0, 0
    for row in rows:
        example = encode(row, tiny.tokenizer())
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
        count += (labels[0, 1:] != -100).sum().item()
    return total / count, count


def test_held_out_loss_is_the_mean_over_label_tokens_of_each_file(tmp_path, model):
    rows = tiny.chat_rows(12)
    rows[3]["messages"][1]["content"] = "a much longer answer " * 3  # padding for the others
    files = [
        tiny.write_rows(tmp_path / "a.jsonl", rows[:6]),
        tiny.write_rows(tmp_path / "b.jsonl", rows[6:]),
    ]
    found = sc.evaluate(model, files, tokenizer=tiny.tokenizer())
    for path, part in zip(files, (rows[:6], rows[6:]), strict=True):
        loss, tokens = loss_one_row_at_a_time(model, part)
        assert found["loss"][path]["loss"] == pytest.approx(loss, abs=1e-5)
        assert found["loss"][path]["tokens"] == tokens
        assert found["loss"][path]["rows"] == 6 and found["loss"][path]["dropped"] == 0
    assert 0 < found["routing"]["load_entropy"] <= 1
    assert 0 <= found["routing"]["mutual_information_bits"] <= 1


def test_dropped_rows_are_counted_and_limits_kept(tmp_path, model):
    rows = tiny.chat_rows(6)
    rows[0]["messages"][1]["content"] = "long " * 200
    path = tiny.write_rows(tmp_path / "a.jsonl", rows)
    found = sc.evaluate(model, path, tokenizer=tiny.tokenizer(), max_length=64, limit=3)
    assert found["loss"][path]["dropped"] == 1 and found["loss"][path]["rows"] == 3


def test_tensors_and_dicts_of_inputs(model):
    ids = torch.arange(3, 43).view(2, 20)
    plain = sc.evaluate(model, [ids])["loss"]["data"]
    padded = F.pad(ids, (0, 5))
    mask = F.pad(torch.ones_like(ids), (0, 5))
    masked = sc.evaluate(model, [{"input_ids": padded, "attention_mask": mask}])["loss"]["data"]
    assert masked["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert masked["tokens"] == plain["tokens"] == 38


def test_dense_models_are_evaluated_alike(tmp_path):
    path = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(4))
    found = sc.evaluate(tiny.llama(), path, tokenizer=tiny.tokenizer())
    assert found["loss"][path]["loss"] == pytest.approx(
        loss_one_row_at_a_time(tiny.llama(), tiny.chat_rows(4))[0], abs=1e-5
    )
    assert found["routing"] == {}


def test_evaluation_keeps_each_modules_mode(model, tmp_path):
    path = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(2))
    model.model.layers[0].train()
    first = sc.evaluate(model, path, tokenizer=tiny.tokenizer())
    assert model.model.layers[0].training and not model.model.layers[1].training
    model.eval()
    assert first == sc.evaluate(model, path, tokenizer=tiny.tokenizer())  # no dropout either way


def choice_row(prompt: str, choices: list[str], answer: int, template: str = "t") -> dict:
    return {"prompt": prompt, "choices": choices, "answer": answer, "template": template}


def test_rank_classification_takes_the_likeliest_choice(tmp_path, model):
    rows = [
        choice_row(f"say {w}", [w, "something else entirely", "the sea"], i % 3, f"t{i % 2}")
        for i, w in enumerate(tiny.WORDS)
    ]
    path = tiny.write_rows(tmp_path / "choice.jsonl", rows)
    found = sc.evaluate(model, choices=path, tokenizer=tiny.tokenizer())["choice"][path]
    right: dict[str, list[bool]] = {"t0": [], "t1": []}
    for row in rows:
        scores = []
        for choice in row["choices"]:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": choice},
            ]
            loss, tokens = loss_one_row_at_a_time(model, [{"messages": messages}])
            scores.append(-loss * tokens)
        right[row["template"]].append(scores.index(max(scores)) == row["answer"])
    expected = sum(sum(r) / len(r) for r in right.values()) / 2  # the median of two
    assert found["accuracy"] == pytest.approx(expected)
    assert found["templates"] == 2 and found["rows"] == 10


def test_the_median_over_templates_is_taken(tmp_path, model):
    rows = [
        choice_row("say red", ["red", "blue"], a, t) for t, a in zip("abc", (0, 0, 1), strict=True)
    ]
    path = tiny.write_rows(tmp_path / "choice.jsonl", rows)
    found = sc.evaluate(model, choices=path, tokenizer=tiny.tokenizer())["choice"][path]
    assert found["accuracy"] in (0.0, 1.0)  # two templates agree, the third says the opposite


PAIR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 96,
    "max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
SEAMLESS = {
    **PAIR, "hidden_size": 16, "speech_encoder_layers": 1, "speech_encoder_attention_heads": 2,
    "t2u_encoder_layers": 1, "t2u_decoder_layers": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Bart", PAIR),
        ("M2M100", PAIR),
        ("NllbMoe", {**PAIR, "num_experts": 2, "expert_capacity": 64}),
        ("Blenderbot", PAIR),
        ("BlenderbotSmall", PAIR),
        ("SeamlessM4T", SEAMLESS),
        ("SeamlessM4Tv2", SEAMLESS),
    ],
)
def test_a_decoder_reads_what_its_model_makes_of_labels(kind, options):
    torch.manual_seed(0)
    head = "ForTextToText" if "Seamless" in kind else "ForConditionalGeneration"
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, kind + head)(config).eval()
    ids = torch.randint(4, 90, (3, 8))
    labels = torch.randint(4, 90, (3, 6))
    labels[1, 4:] = -100
    with torch.no_grad():
        for parameter in model.parameters():  # so that what the decoder reads shows
            parameter.mul_(2 if parameter.ndim > 1 else 1)
        own = model(input_ids=ids, labels=labels).loss.item()
    found = sc.evaluate(model, [{"input_ids": ids, "labels": labels}])["loss"]["data"]
    assert found["loss"] == pytest.approx(own, abs=1e-4) and found["tokens"] == 16


def test_t5_is_evaluated_on_its_targets(tmp_path):
    model = cases.dense("t5")
    model.resize_token_embeddings(len(tiny.tokenizer()))
    rows = [{"prompt": f"say {w}", "completion": w} for w in tiny.WORDS]
    path = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    choice = tiny.write_rows(
        tmp_path / "choice.jsonl",
        [choice_row("say red", ["red", "blue"], 0), choice_row("x", ["a", "b"], 1)],
    )
    found = sc.evaluate(model, path, choices=choice, tokenizer=tiny.tokenizer())
    example = encode_pair(load_rows(path)[0], tiny.tokenizer())
    with torch.no_grad():
        one = model(
            input_ids=torch.tensor([example["input_ids"]]), labels=torch.tensor([example["labels"]])
        ).loss.item()
    first = tiny.write_rows(tmp_path / "first.jsonl", rows[:1])
    alone = sc.evaluate(model, first, tokenizer=tiny.tokenizer())["loss"][first]["loss"]
    assert alone == pytest.approx(one, abs=1e-5)
    assert found["loss"][path]["rows"] == 10 and found["choice"][choice]["rows"] == 2


def test_missing_pieces_are_named(tmp_path, model):
    path = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(2))
    with pytest.raises(DataError, match="tokenizer"):
        sc.evaluate(model, path)
    with pytest.raises(DataError, match=r"a\.jsonl.*1"):
        sc.evaluate(model, choices=path, tokenizer=tiny.tokenizer())
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(SparsecraftError, match=r"sparsecraft\[eval\]"):
            sc.evaluate(model, tasks=["arc_easy"], tokenizer=tiny.tokenizer())


def test_first_choices_entropy_and_information():
    weights = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.6, 0.4]])
    indices = torch.tensor([[0, 1], [2, 0], [3, 1]])  # 3: no expert
    routing = Routing(weights, indices, torch.zeros(3, 3))
    assert first_choices_E(routing).tolist() == [0, 1, 1]
    assert first_choices_E(routing, torch.tensor([True, False, True])).tolist() == [0, 1, 0]
    assert load_entropy(torch.tensor([5.0, 5.0])) == pytest.approx(1)
    assert load_entropy(torch.tensor([9.0, 0.0])) == pytest.approx(0)
    assert mutual_information(torch.eye(2) * 7) == pytest.approx(1)
    assert mutual_information(torch.ones(3, 4)) == pytest.approx(0)
    assert mutual_information(torch.eye(3)) == pytest.approx(math.log2(3))


def classifier(**changes) -> transformers.BertForSequenceClassification:
    config = cases.FAMILIES["bert"].config()
    config.vocab_size, config.num_labels = len(tiny.tokenizer()), 3
    config.update(changes)
    return transformers.BertForSequenceClassification(config).eval()


def test_tasks_without_a_held_out_loss_are_refused(tmp_path):
    choice = tiny.write_rows(tmp_path / "choice.jsonl", [choice_row("x", ["a", "b"], 0)])
    for name in ("bert", "vit"):
        with pytest.raises(SparsecraftError, match=r"evaluate has no objective for .*ForCausalLM"):
            sc.evaluate(cases.dense(name), [cases.batch(name, labels=True)])
    config = cases.FAMILIES["bert"].config()
    with pytest.raises(SparsecraftError, match="no objective for BertForTokenClassification"):
        sc.evaluate(transformers.BertForTokenClassification(config), choices=choice)
    with pytest.raises(SparsecraftError, match="no objective for BertForMaskedLM"):
        sc.evaluate(cases.dense("bert"), choices=choice, tokenizer=tiny.tokenizer())
    with pytest.raises(SparsecraftError, match=r"is a classifier.*text and label"):
        sc.evaluate(classifier(), choices=choice, tokenizer=tiny.tokenizer())
    for model in (cases.dense("t5"), classifier()):
        with pytest.raises(DataError, match="no labels"):
            sc.evaluate(model, [torch.arange(3, 15).view(2, 6)])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"num_labels": 1}, "num_labels=1"),
        ({"problem_type": "multi_label_classification"}, "multi"),
    ],
)
def test_a_classifier_of_another_problem_has_no_accuracy(tmp_path, kind, said):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "say red", "label": 0}] * 4)
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.tensor([0, 0])}
    for data in (rows, [batch]):
        with pytest.raises(SparsecraftError, match=f"{said}.*sc.evaluate takes classifiers"):
            sc.evaluate(classifier(**kind), data, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("labels", [torch.rand(2, 3), torch.rand(2), torch.zeros(2, 6).long()])
def test_labels_that_are_no_class_of_a_row_are_refused(labels):
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": labels}
    with pytest.raises(DataError, match="one whole number for each row"):
        sc.evaluate(classifier(), [batch])


def test_classes_that_the_classifier_lacks_are_named(tmp_path):
    rows = [{"text": f"say {w}", "label": i % 3} for i, w in enumerate(tiny.WORDS)]
    path = tiny.write_rows(tmp_path / "good.jsonl", rows)
    found = sc.evaluate(classifier(), path, tokenizer=tiny.tokenizer())["loss"][path]
    assert found["rows"] == 10 and 0 <= found["accuracy"] <= 1
    rows[4]["label"] = 3
    path = tiny.write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 5: the label 3 .*num_labels=3"):
        sc.evaluate(classifier(), path, tokenizer=tiny.tokenizer())
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.tensor([0, -1])}
    with pytest.raises(DataError, match=r"data has the label -1 "):
        sc.evaluate(classifier(), [batch])


def test_load_entropy_is_of_all_slots_and_of_real_tokens(tmp_path, model):
    rows = tiny.chat_rows(6)
    rows[3]["messages"][1]["content"] = "a much longer answer " * 3
    path = tiny.write_rows(tmp_path / "a.jsonl", rows)
    found = sc.evaluate(model, path, tokenizer=tiny.tokenizer())["routing"]
    counts: dict[str, torch.Tensor] = {}
    for row in rows:  # one by one: no padding
        ids = torch.tensor([encode(row, tiny.tokenizer())["input_ids"]])
        with sc.trace(model) as traced, torch.no_grad():
            model(ids)
        for layer, routing in traced.items():
            slots = torch.bincount(routing.indices_TK.flatten(), minlength=4).double()
            counts[layer] = counts.get(layer, 0) + slots
    expected = [load_entropy(count) for count in counts.values()]
    assert found["load_entropy"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert found["load_entropy_min"] == pytest.approx(min(expected), abs=1e-6)


def test_one_expert_has_an_even_load_and_json_holds_no_nan(tmp_path):
    model = tiny.llama()
    sc.convert(model, sc.recipes.upcycling(num_experts=1, top_k=1))
    files = [tiny.write_rows(tmp_path / f"{n}.jsonl", tiny.chat_rows(2)) for n in "ab"]
    found = sc.evaluate(model, files, tokenizer=tiny.tokenizer())
    assert found["routing"]["load_entropy"] == found["routing"]["load_entropy_min"] == 1
    assert json.dumps(found, allow_nan=False)
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(SparsecraftError, match="not finite"):
        sc.evaluate(model, files, tokenizer=tiny.tokenizer())


def test_max_length_stays_within_the_positions(tmp_path):
    model = cases.dense("gpt2")
    model.resize_token_embeddings(len(tiny.tokenizer()))
    rows = tiny.chat_rows(3)
    rows[0]["messages"][1]["content"] = "long " * 60
    path = tiny.write_rows(tmp_path / "a.jsonl", rows)
    for length in (None, cases.POSITIONS):
        found = sc.evaluate(model, path, tokenizer=tiny.tokenizer(), max_length=length)
        assert found["loss"][path]["dropped"] == 1 and found["loss"][path]["rows"] == 2
    with pytest.raises(DataError, match="max_length is 65 and GPT2LMHeadModel has 64 positions"):
        sc.evaluate(model, path, tokenizer=tiny.tokenizer(), max_length=65)
    with pytest.raises(DataError, match="max_length is 1;"):
        sc.evaluate(model, path, tokenizer=tiny.tokenizer(), max_length=1)


def test_positions():
    assert positions_of(cases.dense("opt")) == cases.POSITIONS
    assert positions_of(cases.dense("t5")) is None
    config = transformers.RobertaConfig(
        **cases.BERT_LIKE, vocab_size=96, max_position_embeddings=20, pad_token_id=1
    )
    model = transformers.RobertaForSequenceClassification(config).eval()
    assert positions_of(model) == 18
    model(torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 19), 5))


@pytest.mark.parametrize("limit", [0, -2])
def test_limits_below_one_are_refused(tmp_path, model, limit):
    path = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(2))
    choice = tiny.write_rows(tmp_path / "choice.jsonl", [choice_row("x", ["a", "b"], 0)])
    for where in ({"data": path}, {"choices": choice}):
        with pytest.raises(SparsecraftError, match=f"limit is {limit}; .* at least 1"):
            sc.evaluate(model, **where, tokenizer=tiny.tokenizer(), limit=limit)


def test_edits_say_where_they_stand():
    recipe = sc.recipes.camelidae(num_experts=4, lora_rank=0)
    assert "4 adapter after every ffn, router" in edit_lines(recipe)[0]
    recipe = sc.recipes.camelidae(num_experts=4, lora_rank=0, paths="model.layers.1.mlp")
    assert "4 adapter after ffn at model.layers.1.mlp, router" in edit_lines(recipe)[0]
