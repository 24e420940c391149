"""Rows, masks, mixing, packing, collation and the demo corpus, on tokenizers made here."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsecraft.data import corpus as data
from sparsecraft.data.batches import as_batches, collate
from sparsecraft.data.encoding import IGNORED, encode, encode_label, encode_pair, prompt_ids, render
from sparsecraft.data.files import Place
from sparsecraft.data.prepare import mix, pack, prepare
from sparsecraft.data.rows import load_choices, load_rows
from sparsecraft.errors import DataError
from tests import tiny

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3's: the last answer alone gets an empty thinking block.
THINKING = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}",
)
# Drops what an earlier turn thought: its tokens in the whole chat are not those it was made of.
FORGETFUL = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}",
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT = [
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "An apple."},
    {"role": "user", "content": "And another?"},
    {"role": "assistant", "content": "\nA pear, an apple."},
]


def make_tokenizer(template=CHATML, adds_bos=False, **kwargs):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["Name a fruit. An apple. And another? A pear.\n\n"] * 9, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    eos = "<|im_end|>" if template else "</s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        chat_template=template,
        **kwargs,
    )


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer()


def write(path, *rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def trained(example, tok):
    """The runs of trained tokens, as text."""
    runs, current = [], []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            current.append(token)
        elif current:
            runs.append(tok.decode(current))
            current = []
    return [*runs, tok.decode(current)] if current else runs


# ------------------------------------------------------------------ rows
USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [USER, REPLY], "source": "x"}, [USER, REPLY]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [SYSTEM, USER, REPLY],
        ),
        ({"prompt": "q", "completion": "a"}, [USER, REPLY]),
        ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, [SYSTEM, USER, REPLY]),
        ({"instruction": "q", "output": "a"}, [USER, REPLY]),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            [SYSTEM, {"role": "user", "content": "q\n\ni"}, REPLY],
        ),
        (
            {"corpus": "", "instruction": "s", "conversation": [{"input": "q", "output": "a"}] * 2},
            [SYSTEM, USER, REPLY, USER, REPLY],
        ),
    ],
)
def test_chat_shapes(tmp_path, row, messages):
    rows = load_rows(write(tmp_path / "a.jsonl", row))
    assert rows.to_list() == [{"messages": messages}]


def test_text_shapes_and_containers(tmp_path):
    labelled = [{"text": "one", "label": 1}, {"text": "2020-01-01", "label": 0}]
    write(tmp_path / "a.jsonl.gz", *labelled)
    (tmp_path / "b.json").write_text(json.dumps(labelled, indent=1))
    write(tmp_path / "c.json", *labelled)  # JSON lines under the name .json
    Dataset.from_list(labelled).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.parquet.gz").write_bytes(
        gzip.compress((tmp_path / "d.parquet").read_bytes(), mtime=0)
    )
    for name in ("a.jsonl.gz", "b.json", "c.json", "d.parquet", "d.parquet.gz"):
        assert load_rows(tmp_path / name).to_list() == labelled, name
    (tmp_path / "e.txt").write_text("a line\n\nanother")
    assert load_rows(tmp_path / "e.txt").to_list() == [{"text": "a line\n\nanother"}]
    assert len(load_rows(tmp_path)) == 11


def test_a_folder_is_read_by_split(tmp_path, caplog):
    (tmp_path / "notes.md").write_text("of the data")
    write(tmp_path / "math.train.jsonl", {"text": "t"})
    write(tmp_path / "math.heldout.jsonl", {"text": "h"})
    write(tmp_path / "math.valid.jsonl", {"text": "v"})
    for split, text in {"train": "t", "heldout": "h", "validation": "v"}.items():
        assert load_rows(tmp_path, split)["text"] == [text]
    with pytest.raises(DataError, match="no data file of the split 'test'"):
        load_rows(tmp_path, "test")
    assert "notes.md: ignored, its extension is not one of" in caplog.text


def test_split_words_are_whole_words(tmp_path, tok, caplog):
    names = ("constraints", "latest", "math", "retrieval")
    for name in names:
        write(tmp_path / f"{name}.jsonl", {"text": name})
    for split in ("train", "test"):  # no file has a split word: all are taken
        assert tuple(load_rows(tmp_path, split)["text"]) == names
    assert not caplog.records
    write(tmp_path / "math_Test-0.jsonl", {"text": "t"})
    write(tmp_path / "math.val.jsonl.gz", {"text": "v"})
    assert tuple(load_rows(tmp_path)["text"]) == names
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("the split 'train': math.val.jsonl.gz, math_Test-0.jsonl")
    for split, text in {"test": "t", "validation": "v", "valid": "v"}.items():
        assert load_rows(tmp_path, split)["text"] == [text]
    # A single file is read whole, whatever its name and the split.
    for name in ("math.jsonl", "math.val.jsonl.gz"):
        assert prepare(tmp_path / name, tok, split="test")[1]["rows"] == 1


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ('{"text": ', "not JSON"),
        ('["text"]', "found list"),
        ({"question": "q", "answer": None}, r"question, answer \(null\)"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"message 2 \(assistant\)"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content None"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": "hello"}, "found 'hello'"),
        ({"messages": ["hello"]}, "where a message belongs"),
        ({"conversations": []}, "non-empty list"),
        ({"prompt": "q", "completion": ""}, "content ''"),
        ({"text": "t", "label": "good"}, "label is 'good'"),
        ({"text": "t", "label": -1}, "label is -1"),
        ({"text": "t", "label": True}, "label is True"),
        ({"text": "t", "label": 2**63}, "label is 9223372036854775808"),
        ({"text": "a\ud800"}, r"lone surrogate '\\ud800' stands at character 1"),
        ({"messages": [{"role": "user", "content": "\udfff"}, REPLY]}, "lone surrogate"),
        ({"instruction": "q", "input": "\ud800", "output": "a"}, "lone surrogate"),
        ('{"text": "a", "x": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ({"text": 3}, "not text"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, bad, found):
    good = {"text": "x"}
    path = write(tmp_path / "rows.jsonl", good, "", good, bad)
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 4: .*{found}"):
        load_rows(path)


def test_a_deeply_nested_json_document_names_its_line(tmp_path):
    deep = "[" * 200_000 + "]" * 200_000
    for content in (
        f'[{{"text": "[[["}},\n\n {deep},\n\n{deep}\n]',
        f'{{"text": "a"}}\n\n{deep}\n',
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=r"a\.json, line 3: .*nested too deeply"):
            load_rows(tmp_path / "a.json")


def test_a_value_that_no_message_can_show_names_its_line(monkeypatch):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    placed = [(Place("a.jsonl", "line 7"), {"text": deep})]
    monkeypatch.setattr("sparsecraft.data.rows.objects", lambda *asked: placed)
    with pytest.raises(DataError, match=r"a\.jsonl, line 7: .*nested too deeply"):
        load_rows("a.jsonl")


def test_only_names_of_datasets_reach_the_hub(monkeypatch):
    asked, found = [], [{"text": "a", "label": None}, {"text": 3}]
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or found)
    for path in ("missing.jsonl", "some/missing.json.gz", "a/b/c", "../a", "-a"):
        with pytest.raises(DataError, match=r"no such file or folder\.$"):
            load_rows(path)
    assert not asked
    with pytest.raises(DataError, match=r"^some/set, row 2: 'text' is 3, not text"):
        load_rows("some/set", "test")
    assert asked == [(("some/set",), {"split": "test"})]


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"text": "of the current folder"})
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("/dev/null", tmp_path / "pipe.jsonl"):
        with pytest.raises(DataError, match="neither a regular file nor a folder"):
            load_rows(path)
    for read in (load_rows, load_choices):
        for name in ("", " "):
            with pytest.raises(DataError, match=f"data path is '{name}'"):
                read(name)
    assert len(load_rows(".")) == 1


def test_a_bad_parquet_row_is_numbered(tmp_path):
    Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.5]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: the label is 0\.5"):
        load_rows(tmp_path / "a.parquet")


def test_bad_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "broken.json").write_text('[{"text": "a"},\n oops]')
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 50)[:-9])
    (tmp_path / "no.parquet").write_bytes(b"nonsense")
    for name, found in {
        "empty.jsonl": "holds no rows",
        "empty.json": "holds no rows",
        "broken.json": "line 2: not JSON",
        "a.csv": "unknown extension '.csv'",
        "torn.jsonl.gz": "cannot be read",
        "no.parquet": "cannot be read as .parquet",
        "missing.jsonl": "no such file",
    }.items():
        with pytest.raises(DataError, match=rf"{name}.*{found}"):
            load_rows(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no data file .* \(found nothing;"):
        load_rows(tmp_path / "folder")
    (tmp_path / "folder" / "b.csv").write_text("x")
    with pytest.raises(DataError, match=r"no data file .* \(found b\.csv;"):
        load_rows(tmp_path / "folder")
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        load_choices(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="the hub gave no dataset"):
        load_rows("nobody/no-such-dataset")


def test_load_choices(tmp_path):
    row = {"prompt": "2 + 2?", "choices": ["3", "4"], "answer": 1, "task": "sum"}
    assert load_choices(write(tmp_path / "a.jsonl.gz", row)) == [row]
    for change in (
        {"prompt": ""},
        {"prompt": "  "},
        {"prompt": 4},
        {"prompt": "\ud800"},
        {"choices": ["4"]},
        {"choices": "34"},
        {"choices": ["", "4"]},
        {"choices": ["\ud800", "4"]},
        {"answer": 2},
    ):
        with pytest.raises(DataError, match=r"b\.jsonl, line 2"):
            load_choices(write(tmp_path / "b.jsonl", row, row | change))


# ------------------------------------------------------------------ encoding
@pytest.mark.parametrize("adds_bos", [False, True])
def test_every_assistant_turn_trains_and_nothing_else(adds_bos):
    tok = make_tokenizer(adds_bos=adds_bos)
    example = encode({"messages": CHAT}, tok)
    assert trained(example, tok) == ["An apple.<|im_end|>", "\nA pear, an apple.<|im_end|>"]
    text = tok.apply_chat_template(CHAT, tokenize=False)
    assert tok.decode(example["input_ids"]) == ("<s>" if adds_bos else "") + text
    # The training tokens begin with exactly those of the prompt that generation starts from.
    prompt = prompt_ids(CHAT[:1], tok)
    assert example["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"text": "An apple."}, {"text": "<s>A pear."}])
@pytest.mark.parametrize("template", [None, CHATML, "{{ bos_token }}" + CHATML])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_bos(row, template, adds_bos):
    tok = make_tokenizer(template, adds_bos)
    written = ("messages" in row and "bos" in (template or "")) or "<s>" in row.get("text", "")
    ids = encode(row, tok)["input_ids"]
    assert ids.count(tok.bos_token_id) == int(adds_bos or written)
    assert ids[-1] == tok.eos_token_id or "messages" in row


MERGING = [*CHAT[:3], {"role": "assistant", "content": "\n\nA pear."}]


def test_a_merge_across_the_boundary_belongs_to_the_answer():
    tok = make_tokenizer(None)
    # "### Assistant:\n" + "\n\nA pear": the first two of three line ends are one token.
    runs = trained(encode({"messages": MERGING}, tok), tok)
    assert runs == ["An apple.</s>", "\n\n\nA pear.</s>"]


def test_plain_template_for_a_tokenizer_without_one():
    tok = make_tokenizer(None)
    text = render([SYSTEM, *CHAT[:2]], tok)
    expected = "### System:\ns\n### Human:\nName a fruit.\n### Assistant:\nAn apple.</s>\n"
    assert text == expected
    assert render(CHAT[:1], tok, generate=True).endswith("fruit.\n### Assistant:\n")


def test_templates_that_change_earlier_turns():
    tok = make_tokenizer(THINKING)
    runs = trained(encode({"messages": CHAT}, tok), tok)
    assert runs[0] == "An apple.<|im_end|>"
    assert runs[1] == "<think>\n\n</think>\n\n\nA pear, an apple.<|im_end|>"
    tok = make_tokenizer(FORGETFUL)
    thinking = [CHAT[0], {"role": "assistant", "content": "Hm.</think>A pear."}, *CHAT[2:]]
    with pytest.raises(DataError, match="message 2 differently"):
        encode({"messages": thinking}, tok)
    with pytest.raises(DataError, match="refuses the row"):
        encode({"messages": [REPLY]}, make_tokenizer("{{ raise_exception('no') }}"))


def test_a_tokenizer_without_offsets(tok):
    class Slow:
        is_fast = False

        def __init__(self, fast):
            self.fast = fast

        def __getattr__(self, name):
            return getattr(self.fast, name)

        def __call__(self, *args, return_offsets_mapping=False, **kwargs):
            assert not return_offsets_mapping
            return self.fast(*args, **kwargs)

    assert encode({"messages": CHAT}, Slow(tok)) == encode({"messages": CHAT}, tok)
    with pytest.raises(DataError, match="merges characters"):
        encode({"messages": MERGING}, Slow(make_tokenizer(None)))


def test_encode_pair_and_label():
    tok = make_tokenizer(None)
    pair = encode_pair({"messages": CHAT[:2]}, tok, 64)
    assert tok.decode(pair["input_ids"]) == "Name a fruit."
    assert tok.decode(pair["labels"]) == "An apple.</s>"
    assert pair["attention_mask"] == [1] * len(pair["input_ids"])
    long = encode_pair({"messages": CHAT}, tok, 128)
    assert tok.decode(long["input_ids"]).endswith("### Human:\nAnd another?\n### Assistant:\n")
    assert tok.decode(long["labels"]) == "\nA pear, an apple.</s>"
    assert encode_pair({"messages": CHAT[:2]}, tok, 3) is None
    assert encode_pair({"messages": CHAT[:1]}, tok) is None
    assert encode_label({"text": "A pear.", "label": 2}, tok)["labels"] == 2


def test_pairs_and_labels_fit_drop_or_are_cut():
    tok = make_tokenizer(None, model_max_length=4)
    pair, label = {"messages": CHAT[:2]}, {"text": "A pear.", "label": 2}
    for encoder, row in ((encode_pair, pair), (encode_label, label)):
        whole = encoder(row, tok)
        longest = max(len(value) for value in whole.values() if isinstance(value, list))
        assert encoder(row, tok, longest) == whole
        assert encoder(row, tok, longest - 1) is None
        cut = encoder(row, tok, 2, "truncate")
        assert cut == {k: v[:2] if isinstance(v, list) else v for k, v in whole.items()}
        assert encoder(row | {"train": False}, tok) is None
    assert encode_label({"text": "", "label": 2}, tok) is None
    for encoder, row in ((encode_pair, label), (encode_label, {"text": "A pear."})):
        with pytest.raises(DataError, match="row needs"):
            encoder(row, tok)
    encode(pair, tok)
    assert not tok.deprecation_warnings, "lengths are our affair"


def test_an_answer_ends_once():
    tok = make_tokenizer(None)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    labels = encode_pair({"messages": CHAT[:2]}, tok)["labels"]
    assert tok.decode(labels) == "An apple.</s>"
    tok = make_tokenizer(None)
    tok.eos_token = None
    assert tok.decode(encode_pair({"messages": CHAT[:2]}, tok)["labels"]) == "An apple."
    assert tok.decode(encode({"text": "A pear."}, tok)["input_ids"]) == "A pear."


# ------------------------------------------------------------------ prepare, mix
def test_prepare_counts_every_row(tmp_path, tok):
    long = [USER, {"role": "assistant", "content": "An apple. " * 60}]
    rows = [{"messages": CHAT}, {"messages": long}, {"messages": [USER]}, {"text": ""}]
    path = write(tmp_path / "a.jsonl", *rows)
    dataset, counts = prepare(path, tok, max_length=100)
    assert (
        counts.items()
        >= {
            "rows": 4,
            "too_long": 1,
            "no_trainable_token": 2,
            "examples": 1,
            "truncated": 0,
        }.items()
    )
    assert dataset[0] == encode({"messages": CHAT}, tok)
    dataset, counts = prepare(path, tok, max_length=100, overlong="truncate")
    assert (counts["truncated"], counts["too_long"], len(dataset)) == (1, 0, 2)
    with pytest.raises(DataError, match=r"remain of 4: 2 are longer .* 2 have no trainable"):
        prepare(path, tok, max_length=10)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*refuses"):
        write(path, {"messages": CHAT}, {"messages": [REPLY]})
        prepare(
            path, make_tokenizer("{{ raise_exception('no') if messages|length == 1 }}" + CHATML)
        )
    with pytest.raises(DataError, match="Did you mean 'seq2seq'"):
        prepare(path, tok, task="seq2sec")
    with pytest.raises(DataError, match="overlong is 'cut'"):
        prepare(path, tok, overlong="cut")
    for sources, options in (
        ([], {}),
        (path, {"max_length": 1}),
        (path, {"packing": True, "task": "seq2seq"}),
    ):
        with pytest.raises(DataError):
            prepare(sources, tok, **options)


def test_long_text_is_split_and_every_token_is_a_target_once(tmp_path, tok):
    text = "Name a fruit. An apple. And another? A pear."
    path = write(tmp_path / "a.jsonl", {"text": text})
    whole = encode({"text": text}, tok)["input_ids"]
    for length in (2, 5, len(whole) - 1, len(whole)):
        dataset, counts = prepare(path, tok, max_length=length)
        assert max(map(len, dataset["input_ids"])) <= length
        targets = [label for row in dataset["labels"] for label in row if label != IGNORED]
        assert sorted(targets) == sorted(whole[1:])
        assert counts["trained_tokens"] == len(targets)


def parts(*sizes):
    return [
        Dataset.from_dict({"input_ids": [[source, row] for row in range(size)]})
        for source, size in enumerate(sizes)
    ]


def test_mix_by_weight():
    mixed = mix(parts(30, 40, 10), [2, 1, 1], seed=3)
    ids = [tuple(row) for row in mixed["input_ids"]]
    of = [[row for row in ids if row[0] == source] for source in range(3)]
    assert [len(rows) for rows in of] == [80, 40, 40]
    assert [len(set(rows)) for rows in of] == [30, 40, 10]  # every row at least once
    assert {of[0].count(row) for row in of[0]} == {2, 3}  # and evenly
    assert ids == [tuple(row) for row in mix(parts(30, 40, 10), [2, 1, 1], 3)["input_ids"]]
    assert ids != [tuple(row) for row in mix(parts(30, 40, 10), [2, 1, 1], 4)["input_ids"]]
    assert sorted(map(tuple, mix(parts(3, 4))["input_ids"])) == sorted(
        tuple(row) for part in parts(3, 4) for row in part["input_ids"]
    )
    for weights in ([1, 1], [1, 1, 0], [1, 1, -1], [1, 1, float("inf")], [1, 1, float("nan")]):
        with pytest.raises(DataError, match="one number above 0"):
            mix(parts(3, 4, 5), weights)
    for weights in ([1e-9, 1], [1, 1e-320], [200, 1]):
        with pytest.raises(DataError, match=r"out of the 7 read, more than 100 times"):
            mix(parts(3, 4), weights)
    assert len(mix(parts(1, 1), [199, 1])) == 200


# ------------------------------------------------------------------ pack, collate
def documents(count, longest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(2, longest + 1, (1,), generator=generator))
        ids = torch.randint(5, 60, (size,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    return Dataset.from_list(rows)


def unpack(dataset):
    for row in dataset:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        at = 0
        for size in row["seq_lengths"]:
            yield tuple(row["input_ids"][at : at + size]), tuple(row["labels"][at : at + size])
            at += size


def test_packing_loses_nothing_and_cuts_nothing():
    dataset = documents(1500, 20)  # more than one of the 1,000-row batches that TRL packs
    packed = pack(dataset, 32, seed=1)
    assert len(packed) < 0.6 * len(dataset)
    assert max(map(len, packed["input_ids"])) <= 32
    rows = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in dataset]
    assert sorted(unpack(packed)) == sorted(rows)
    with pytest.raises(DataError, match="the longest of 1500"):
        pack(dataset, 10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_pack_do_not_see_each_other(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    rows = pack(documents(7, 9), 16)
    batch = collate(list(rows), pad_id=0, packed=True)
    mask = batch.pop("token_mask")
    assert len(rows) > 1 and "attention_mask" not in batch and not mask.all()
    assert mask.sum() == sum(map(len, rows["input_ids"]))
    assert (batch["labels"][~mask] == IGNORED).all()
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        for index, row in enumerate(rows):
            at = 0
            for size in row["seq_lengths"]:
                alone = model(torch.tensor([row["input_ids"][at : at + size]])).logits[0]
                torch.testing.assert_close(packed[index, at : at + size], alone)
                assert batch["position_ids"][index, at : at + size].tolist() == list(range(size))
                at += size


def test_rows_of_one_document_need_no_mask(monkeypatch):
    """Attention without a mask is several times faster on a GPU; padding is behind what is real."""
    model = tiny.llama().eval()
    rows = [
        {"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]}
        for ids in (list(range(5, 14)), list(range(20, 25)))
    ]
    batch = collate(rows, pad_id=0, packed=True)
    mask, masks = batch.pop("token_mask"), []
    attention = functional.scaled_dot_product_attention

    def look(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", look)
    assert mask.sum(1).tolist() == [9, 5]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        assert masks and all(found is None for found in masks)
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(packed[index, : len(alone)], alone)
    several = collate([rows[0], rows[1] | {"seq_lengths": [2, 3]}], pad_id=0, packed=True)
    assert several["position_ids"][1].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]


def test_collate_pads():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "labels": [IGNORED]},
    ]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert batch["token_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["token_mask"].dtype == torch.bool and batch["input_ids"].dtype == torch.long
    assert torch.equal(batch["attention_mask"], batch["token_mask"].long())
    labelled = [{"input_ids": [5], "labels": 1}, {"input_ids": [5, 6], "labels": 0}]
    assert collate(labelled, pad_id=0)["labels"].tolist() == [1, 0]
    pair = [
        {"input_ids": [5], "labels": [1, 2]},
        {"input_ids": [5, 6, 7], "labels": [3]},
    ]
    batch = collate(pair, pad_id=0)
    assert batch["input_ids"].shape == (2, 3) and batch["labels"].tolist() == [[1, 2], [3, IGNORED]]
    routed = [rows[0] | {"expert": [2, 1, 2]}, rows[1] | {"expert": [1]}]
    assert collate(routed, pad_id=9)["expert_ids"].tolist() == [[2, 1, 2], [1, 0, 0]]
    assert collate(routed[1:], pad_id=9)["expert_ids"].tolist() == [[1]]


def test_as_batches(tmp_path, tok):
    path = write(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 3)
    batches = list(as_batches(path, tok, batch_size=2))
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 1]
    assert set(batches[0]) == {"input_ids", "labels", "attention_mask"}
    ids = torch.ones(2, 4, dtype=torch.long)
    several = [ids, {"input_ids": ids}, BatchEncoding({"input_ids": ids})]
    assert [b["input_ids"].shape for b in as_batches(iter(several))] == [(2, 4)] * 3
    assert len(list(as_batches(ids))) == 1
    with pytest.raises(DataError, match="a tokenizer is needed"):
        next(as_batches(str(path)))
    with pytest.raises(DataError, match=r"^data is a\.jsonl: a tokenizer"):
        next(as_batches(("a.jsonl",)))
    with pytest.raises(DataError, match=r"^data is a\.jsonl, b\.jsonl: a tokenizer"):
        next(as_batches(["a.jsonl", "b.jsonl"]))
    for bad in (3, [torch.ones(4)], [torch.ones(2, 4)], [ids[0]], ["x", 3]):
        with pytest.raises(DataError, match="data"):
            next(as_batches(bad))


# ------------------------------------------------------------------ the demo corpus
@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    paths = data.demo(tmp_path_factory.mktemp("demo"), rows=300)
    return paths, {
        domain: {
            split: [row["messages"] for row in load_rows(path)] for split, path in splits.items()
        }
        for domain, splits in paths.items()
    }


def test_demo_sizes_and_disjointness(demo):
    _, corpus = demo
    assert set(corpus) == {"math", "code", "general"}
    for splits in corpus.values():
        assert len(splits["train"]) == 300 and len(splits["heldout"]) == 30
        train = {message["content"] for messages in splits["train"] for message in messages}
        heldout = {message["content"] for messages in splits["heldout"] for message in messages}
        assert not train & heldout and len(heldout) == 60
        for messages in splits["train"]:
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert len(messages[1]["content"]) <= 700


def test_demo_is_deterministic(demo, tmp_path):
    paths, _ = demo
    again = data.demo(tmp_path / "again", rows=300)
    other = data.demo(tmp_path / "other", rows=300, seed=1)
    for domain in paths:
        for split in ("train", "heldout"):
            assert paths[domain][split].read_bytes() == again[domain][split].read_bytes()
            assert paths[domain][split].read_bytes() != other[domain][split].read_bytes()
    with pytest.raises(DataError, match="at least 10"):
        data.demo(tmp_path, rows=3)


def test_demo_arithmetic_is_right(demo):
    _, corpus = demo
    for question, answer in corpus["math"]["train"] + corpus["math"]["heldout"]:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer["content"])
        assert steps and "{" not in question["content"] + answer["content"]
        for left, sign, right, value in steps:
            exact = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
                "/": int(left) / int(right),
            }[sign]
            assert exact == int(value) > 0
        assert answer["content"].endswith(f"The answer is {steps[-1][3]}.")


def test_demo_code_parses(demo):
    import ast

    _, corpus = demo
    answers = [answer["content"] for _, answer in corpus["code"]["train"]]
    programs = [text for text in answers if text.startswith("```python\n")]
    assert programs
    for text in programs:
        assert ast.parse(text.removeprefix("```python\n").removesuffix("```")).body


def test_importing_data_is_cheap():
    probe = (
        "import sys, sparsecraft.data.prepare; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
