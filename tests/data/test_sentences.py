"""Sentence embeddings, and their way to routers: training, evaluation, generation, command line."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.data import sentences
from sparsecraft.data.batches import collate
from sparsecraft.data.encoding import encode, prompt_ids
from sparsecraft.data.prepare import prepare
from sparsecraft.data.sentences import Prompts, embed, prompt_text
from sparsecraft.dense import hub
from sparsecraft.errors import DataError, RecipeError, SparsecraftError
from sparsecraft.evaluation.held_out import evaluate
from sparsecraft.serving import generation
from sparsecraft.serving.generation import answer
from tests import cases, tiny

WIDTH = 16
FAST = {"batch_size": 8, "max_length": 128, "steps": 1, "progress": False, "learning_rate": 1e-2}
TEXTS = ["say red cat", "two dogs see the sea " * 3, "x", "say red cat", "sun and sea"]
USER = {"role": "user", "content": "say red"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return tiny.save_encoder(tmp_path_factory.mktemp("encoder"), WIDTH)


def changes(encoder: str, width: int = WIDTH) -> dict[str, object]:
    values = {"encoder": encoder, "sentence_dim": width}
    return {f"edits.{i}.router.{key}": v for i in range(3) for key, v in values.items()}


def converted(encoder: str, model=None, width: int = WIDTH):
    """A model whose vectors and routers are random: what it says depends on the sentence."""
    if model is None:
        model = tiny.llama()
        for parameter in model.parameters():
            parameter.data *= 5 if parameter.ndim > 1 else 1
    recipe = sc.recipes.mov(num_experts=3, router="sentence")
    sc.convert(model, sc.override(recipe, changes(encoder, width)))
    cases.randomize_new(model, std=1.0)
    return model.eval()


@pytest.fixture
def rows(tmp_path) -> str:
    """Eight rows that fit into one pack."""
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(8))


# ---------------------------------------------------------------------------------------- embed
def plain(texts: list[str], encoder: str) -> torch.Tensor:
    """One text at a time, without padding, by transformers alone."""
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_an_embedding_is_the_normalized_mean_of_the_texts_own_tokens(encoder, batch_size):
    found = embed(TEXTS, encoder, batch_size=batch_size)
    assert found.shape == (len(TEXTS), WIDTH) and found.dtype == torch.float32
    assert not found.requires_grad and not found.is_inference()
    assert torch.allclose(found, plain(TEXTS, encoder), atol=1e-6)
    assert torch.equal(found[0], found[3]) and (found[0] - found[1]).abs().max() > 0.1
    assert torch.equal(found, embed(TEXTS, encoder, batch_size=batch_size))
    assert torch.equal(found, embed(tuple(TEXTS), encoder, batch_size=batch_size))
    assert embed([], encoder).shape == (0, WIDTH)


def test_an_encoder_with_a_head_and_a_length_of_its_own(encoder, tmp_path):
    torch.manual_seed(6)
    config = transformers.AutoConfig.from_pretrained(encoder)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    ids = tiny.tokenizer()(TEXTS[1], return_tensors="pt")["input_ids"][:, :3]
    with torch.no_grad():
        mean = model.eval().bert(ids).last_hidden_state[0].mean(0)
    found = embed(TEXTS[1:2], str(tmp_path))
    assert torch.allclose(found[0], mean / mean.norm(), atol=1e-6)


def test_what_cannot_be_embedded_is_refused(encoder, tmp_path):
    for texts in ("a text", ["a", 1], 1):
        with pytest.raises(SparsecraftError, match="embed takes a list of texts"):
            embed(texts, encoder)
    with pytest.raises(DataError, match="has no token"):
        embed(["a", ""], encoder)
    with pytest.raises(SparsecraftError, match="batch_size is 0"):
        embed(["a"], encoder, batch_size=0)
    causal = tiny.save_dense(tmp_path / "causal")
    with pytest.raises(SparsecraftError, match="is no text encoder but a model for causal"):
        embed(["a"], causal)
    hub.load_dense(encoder).save_pretrained(tmp_path / "mute")
    with pytest.raises(SparsecraftError, match="has no tokenizer; copy"):
        embed(["a"], str(tmp_path / "mute"))


# --------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": tiny.chat_rows(1)[0]["messages"]}, "say red red"),
        ({"messages": [{"role": "system", "content": "s"}, USER]}, "s\n\nsay red"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}, USER]}, "say red"),
        ({"text": "a review", "label": 1, "messages": None}, "a review"),
    ],
)
def test_the_prompt_ends_before_the_first_answer(row, text):
    assert prompt_text(row) == text


def test_rows_without_a_prompt_are_refused_with_their_place(encoder, tmp_path):
    for row in ({"text": "all of it"}, {"messages": [{"role": "assistant", "content": "a"}]}):
        with pytest.raises(DataError, match="needs a prompt, and this row has none"):
            prompt_text(row)
    path = tiny.write_rows(tmp_path / "a.jsonl", [*tiny.chat_rows(1), {"text": "all of it"}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .* needs a prompt.*completion\.$"):
        prepare(path, tiny.tokenizer(), prompts=Prompts(encoder, WIDTH))


def test_other_recipes_pay_nothing(rows, monkeypatch):
    model = tiny.llama()
    sc.convert(model, sc.recipes.mov(num_experts=3))
    assert Prompts.of(model) is None
    dataset, _ = prepare(rows, tiny.tokenizer(), packing=True)
    assert set(dataset.column_names) == {"input_ids", "labels", "seq_lengths"}
    assert not {"sentence_embeddings", "sentence_ids"} & set(collate(list(dataset), 0, True))
    monkeypatch.setattr(sentences, "embed", None)
    monkeypatch.setattr(generation, "context", None)
    answer(model, tiny.tokenizer(), [USER], max_new_tokens=1)


# -------------------------------------------------------------------------------------- training
def alone(model, encoder: str, row: dict) -> torch.Tensor:
    """Logits of one row by itself, with its own prompt's embedding."""
    ids = encode(row, tiny.tokenizer())["input_ids"]
    embedding = embed([prompt_text(row)], encoder)
    with torch.no_grad():
        return model(torch.tensor([ids]), sentence_embeddings=embedding).logits[0]


def test_packed_tokens_are_routed_by_their_own_sentence(rows, encoder):
    model, prompts = converted(encoder), Prompts(encoder, WIDTH)
    dataset, counts = prepare(rows, tiny.tokenizer(), max_length=64, packing=True, prompts=prompts)
    assert 1 < counts["packs"] < 8
    batch = collate(list(dataset), 0, packed=True, prompts=prompts)
    assert batch["sentence_ids"].shape == batch["input_ids"].shape
    del batch["token_mask"], batch["labels"]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        # Not the sentences of their neighbors: those would say something else.
        batch["sentence_embeddings"] = batch["sentence_embeddings"].roll(1, 0)
        others = model(**batch, use_cache=False).logits
    found = 0
    by_ids = {tuple(encode(row, tiny.tokenizer())["input_ids"]): row for row in tiny.chat_rows(8)}
    for number, row in enumerate(dataset):
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            expected = alone(model, encoder, by_ids[tuple(row["input_ids"][part])])
            assert torch.allclose(packed[number, part], expected, atol=1e-4)
            assert (others[number, part] - expected).abs().max() > 1e-2
            start, found = start + length, found + 1
    assert found == 8


def test_training_sees_the_same_sentences_packed_and_unpacked(rows, encoder, tmp_path):
    losses = {}
    for packing in (True, False):
        model = converted(encoder)
        out = tmp_path / f"packing-{packing}"
        report = sc.train(
            model, rows, out, tokenizer=tiny.tokenizer(), **FAST, packing=packing, seed=1
        )
        losses[packing] = report.loss
    held_out = sc.evaluate(converted(encoder), [rows], tokenizer=tiny.tokenizer())["loss"][rows]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
    assert losses[True] == pytest.approx(held_out["loss"], abs=1e-5)
    trained = sc.load(tmp_path / "packing-True")
    assert trained.sparsecraft.recipe.edits[0].router.decides.encoder == encoder
    router = "model.layers.0.self_attn.k_proj.router.scorer.weight"
    assert not torch.equal(trained.get_parameter(router), converted(encoder).get_parameter(router))


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_other_tasks_have_one_sentence_for_each_row(family, encoder, tmp_path, rows):
    if family == "bert":
        config = cases.dense("bert").config
        config.vocab_size = len(tiny.tokenizer())
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        texts = [
            {"text": f"say {word} {word}", "label": i % 2} for i, word in enumerate(tiny.WORDS)
        ]
        rows = tiny.write_rows(tmp_path / "labels.jsonl", texts)
    else:
        model = cases.dense("t5")
        model.resize_token_embeddings(len(tiny.tokenizer()))
    model = converted(encoder, model)
    before = sc.evaluate(model, [rows], tokenizer=tiny.tokenizer())["loss"][rows]["loss"]
    options = {**FAST, "max_length": 64, "batch_size": 10 if family == "bert" else 8}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    report = sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **options)
    assert report.loss == pytest.approx(before, abs=1e-4)


def test_a_wrong_width_is_told_before_anything_is_written(rows, encoder, tmp_path):
    model = converted(encoder, width=WIDTH + 1)
    with pytest.raises(SparsecraftError, match=r"width 17 .* gives 16; convert with sentence_dim"):
        sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    with pytest.raises(SparsecraftError, match="width 17"):
        answer(model, tiny.tokenizer(), [USER])
    assert not list(tmp_path.glob("out*"))


def test_one_model_has_one_sentence_encoder(encoder):
    recipe = sc.recipes.mov(router="sentence")
    with pytest.raises(RecipeError, match="several encoders"):
        sc.override(recipe, {"edits.0.router.encoder": encoder})


# ------------------------------------------------------------------------------------ evaluation
def test_the_held_out_loss_is_that_of_the_rows_alone(rows, encoder, monkeypatch):
    model, total, tokens = converted(encoder), 0.0, 0
    for row in tiny.chat_rows(8):
        labels = torch.tensor(encode(row, tiny.tokenizer())["labels"])
        logprobs = alone(model, encoder, row)[:-1].log_softmax(-1)
        kept = labels[1:] != -100
        total -= logprobs[kept].gather(1, labels[1:][kept, None]).sum().item()
        tokens += int(kept.sum())
    found = sc.evaluate(model, [rows], tokenizer=tiny.tokenizer())["loss"][rows]
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(total / tokens, abs=1e-4)
    asked, embed = [], sentences.embed
    monkeypatch.setattr(sentences, "embed", lambda t, *a: asked.extend(t) or embed(t, *a))
    sc.evaluate(model, [rows], tokenizer=tiny.tokenizer(), limit=2)
    assert len(asked) == 2, "only the rows that are kept are embedded"


def test_rank_classification_reads_the_prompt(encoder, tmp_path):
    model = converted(encoder)
    row = {"prompt": "say red cat", "choices": ["red cat", "two", "sea"], "answer": 0}
    path = tiny.write_rows(tmp_path / "choice.jsonl", [row])
    scores = []
    for choice in row["choices"]:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": choice},
        ]
        labels = torch.tensor(encode({"messages": messages}, tiny.tokenizer())["labels"])
        logprobs = alone(model, encoder, {"messages": messages})[:-1].log_softmax(-1)
        kept = labels[1:] != -100
        scores.append(logprobs[kept].gather(1, labels[1:][kept, None]).sum().item())
    best = max(range(3), key=scores.__getitem__)
    tiny.write_rows(tmp_path / "choice.jsonl", [{**row, "answer": best}])
    found = sc.evaluate(model, choices=path, tokenizer=tiny.tokenizer())["choice"][path]
    assert found["accuracy"] == 1
    with pytest.raises(SparsecraftError, match="pass choice files instead"):
        evaluate(model, tasks=["sciq"], tokenizer=tiny.tokenizer())


# ------------------------------------------------------------------------------------ generation
def generate(model, ids, **options):
    """New tokens (B, 8), and their logits where they are those of one beam."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    model.generation_config.eos_token_id = None
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "t5", "opt"])  # OPT flattens its tokens
def test_generation_reads_the_sentence_at_every_step(encoder, family, beams):
    model = converted(encoder, cases.dense(family))
    ids = torch.arange(3, 15).reshape(2, 6)
    found = {}
    for name, texts in {"own": ["say red", "two cats"], "other": ["sun", "sea sea"]}.items():
        with sc.context(model, sentence_embeddings=embed(texts, encoder)):
            tokens, found[name] = generate(model, ids, num_beams=beams)
            again, logits = generate(model, ids, num_beams=beams, use_cache=False)
        assert torch.equal(tokens, again) and torch.allclose(found[name], logits, atol=1e-4)
    assert (found["own"] - found["other"]).abs().max() > 1e-2
    with pytest.raises(SparsecraftError, match=r"decides by sentence .* sc\.context"):
        generate(model, ids)


def test_an_answer_is_what_generate_gives_in_the_context(encoder):
    model, tokenizer = converted(encoder), tiny.tokenizer()
    chat = [USER, {"role": "assistant", "content": "red"}, {"role": "user", "content": "two"}]
    ids = torch.tensor([prompt_ids(chat, tokenizer)])
    with sc.context(model, sentence_embeddings=embed(["say red"], encoder)):
        expected, _ = generate(model, ids)
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answer(model, tokenizer, chat, max_new_tokens=8) == text
    with pytest.raises(DataError, match="needs a prompt"):
        answer(model, tokenizer, [{"role": "assistant", "content": "a"}])


def test_sentences_that_do_not_fit_the_batch_are_refused(encoder):
    model = converted(encoder)
    ids, embeddings = torch.arange(3, 15)[None], embed(["say red", "two"], encoder)
    with pytest.raises(SparsecraftError, match="12 tokens of 1 sequences were given 2 sentences"):
        model(ids, sentence_embeddings=embeddings)
    numbers = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(SparsecraftError, match=r"2 sentences with sentence_ids \(1, 5\)"):
        model(ids, sentence_embeddings=embeddings, sentence_ids=numbers)


# ---------------------------------------------------------------------------------- command line
def test_the_command_line_from_conversion_to_answer(encoder, rows, tmp_path, capsys):
    dense, out, trained = tiny.save_dense(tmp_path / "d"), str(tmp_path / "m"), str(tmp_path / "t")
    command = ["convert", "mov", "--model", dense, "--out", out, "--router", "sentence"]
    settings = [f"{key}={value}" for key, value in changes(encoder).items()]
    small = ["--num-experts", "3"]
    assert main([*command, *small, "--data", rows, "--set", *settings]) == 0
    assert "exact at start" in capsys.readouterr().out
    train = ["--steps", "2", "--max-length", "64", "--batch-size", "4", "--learning-rate", "0.01"]
    assert main(["train", out, "--data", rows, "--out", trained, *train]) == 0
    results = tmp_path / "found.json"
    assert main(["eval", trained, "--data", rows, "--json", str(results)]) == 0
    assert json.loads(results.read_text())["loss"][rows]["rows"] == 8
    assert main(["generate", trained, "--prompt", "say red", "--max-new-tokens", "3"]) == 0


def test_the_default_encoder_is_the_packaged_one(capsys, tmp_path, monkeypatch):
    """It is fetched when it is first needed, which a conversion does not."""
    monkeypatch.setenv("SPARSECRAFT_CACHE", str(tmp_path / "cache"))
    sentences._encoder.cache_clear()
    dense, out = tiny.save_dense(tmp_path / "dense"), str(tmp_path / "out")
    command = ["convert", "mov", "--model", dense, "--out", out, "--router", "sentence"]
    assert main([*command, "--num-experts", "3"]) == 0
    with pytest.raises(SparsecraftError, match=r"'minilm' is not in .* HF_HUB_OFFLINE is set"):
        embed(["a"])
    assert Prompts.of(sc.load(out)).encoder == "minilm"
