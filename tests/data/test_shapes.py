"""Row shapes that people publish: read as what they mean, or refused by what they are."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset

from sparsecraft.data.rows import load_choices, load_rows
from sparsecraft.data.shapes import canonical
from sparsecraft.errors import DataError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
# Public words for what is trained, as rows.md lists them.
FLAGS = (
    "weight train training trainable train_on_turn loss loss_mask step_loss_mask "
    "message_loss_mask loss_weight loss_scale output_with_loss"
).split()
ASK = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, row):
    return load_rows(write(tmp_path / "a.jsonl", row)).to_list()[0]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversation": [Q, A]}, [Q, A]),
        ({"conversations": [Q, A]}, [Q, A]),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q, A]),
        ({"dialog": ["q", "a"]}, [Q, A]),
        ({"id": "1", "data": ["q", "a", "q"]}, [Q, A, Q]),
        ({"messages": [{"role": "User", "text": "q"}, {"role": "model", "content": "a"}]}, [Q, A]),
        ({"messages": [A, Q, A]}, [A, Q, A]),
        ({"messages": json.dumps([Q, A])}, [Q, A]),
        ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, [S, Q, A]),
        ({"question": "q", "answer": "a"}, [Q, A]),
        ({"question": "q", "answers": {"text": ["a", "a"], "answer_start": [3, 9]}}, [Q, A]),
        ({"query": "q", "response": "a"}, [Q, A]),
        ({"inputs": "q", "targets": "a"}, [Q, A]),
        ({"problem": "q", "solution": "a", "answer": "7"}, [Q, A]),
        ({"INSTRUCTION": "q", "RESPONSE": "a", "SOURCE": "x"}, [Q, A]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [S, Q, A]),
        ({"chosen": [Q, A]}, [Q, A]),
        ({"prompt": "q", "chosen": [Q, A]}, [Q, A]),
        ({"prompt": "q", "completion": [A]}, [Q, A]),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, Q], "messages": [Q, A]}, [Q, A]),
        ({"messages": [Q, A], "rejected_response": "b"}, [Q, A]),
        ({"prompt": "q", "completion": "a", "rejected": False}, [Q, A]),
        ({"messages": [S, Q, A], "system": "s"}, [S, Q, A]),
        ({"messages": [Q, A], "conversations": [Q, A]}, [Q, A]),
        ({"messages": [Q, A], "text": "user: q assistant: a"}, [Q, A]),
        ({"messages": [Q, A], "text": "q a"}, [Q, A]),
        (
            {"instruction": "i", "input": "in", "output": "a", "text": "# i\n# in\n# a"},
            [Q | {"content": "i\n\nin"}, A],
        ),
        (
            {
                "question": "q",
                "context": " c\n",
                "answer": "a",
                "history": [["q", "a"]],
                "text": "q a c, q: a",
            },
            [Q, A, Q | {"content": "q\n\n c\n"}, A],
        ),
        ({"messages": [Q, A], "text": " "}, [Q, A]),
        ({"messages": [Q, A], "text": 3}, [Q, A]),
        ({"messages": [Q, A], "text": "q a", "label": 1}, [Q, A]),
        ({"question": "q", "answers": ["a"]}, [Q, A]),
        ({"prompt": "q", "completion": "a", "context": "c"}, [Q, A]),
        ({"instruction": "q", "input": " ", "output": "a"}, [Q, A]),
        ({"system": "s", "system_prompt": "s", "prompt": "q", "completion": "a"}, [S, Q, A]),
        ({"messages": [Q | {"input": "x", "output": "y"}, A]}, [Q, A]),
        ({"messages": [Q | {"content": ""}, A]}, [Q | {"content": ""}, A]),
        ({"messages": [Q | {"train": True}, A]}, [Q, A]),
        ({"messages": [], "prompt": "q", "completion": "a"}, [Q, A]),
        (
            {"instruction": "q", "context": "c", "response": "a"},
            [{"role": "user", "content": "q\n\nc"}, A],
        ),
        ({"instruction": "q", "output": "a", "history": [["q", "a"], ["q", "a"]]}, [Q, A] * 3),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
            [Q, A],
        ),
    ],
)
def test_a_shape_that_means_one_thing_is_read(tmp_path, row, messages):
    assert read(tmp_path, row) == {"messages": messages}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"corpus": "t"}, {"text": "t"}),
        ({"text": "t", "answer": "", "label": 1}, {"text": "t", "label": 1}),
        ({"text": "t", "response": "a", "label": 1}, {"text": "t", "label": 1}),
        ({"text": "t", "completion": "", "answers": []}, {"text": "t"}),
        ({"text": "t", "Text": "u"}, {"text": "t"}),
        ({"text": "t", "dialog": "u"}, {"text": "t"}),
        ({"text": "t", "label": 0, "data": ["q", "a"]}, {"text": "t", "label": 0}),
        ({"text": "t", "label": 2**63 - 1}, {"text": "t", "label": 2**63 - 1}),
        ({"text": "t", "loss": 0.5}, {"text": "t"}),
        ({"text": "t", "loss": 2}, {"text": "t"}),
    ],
)
def test_texts_are_told_from_chats_and_flags_from_measures(tmp_path, row, found):
    assert read(tmp_path, row) == found


CALLED = {"role": "assistant", "content": "", "tool_calls": [{**ASK, "id": "1"}]}
WITHOUT_ID = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{k: ASK[k] for k in ("type", "function")}],
}
RESULT = {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "assistant", "content": None, "tool_calls": [ASK]}], [CALLED]),
        (
            [{"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
            [WITHOUT_ID],
        ),
        (
            [
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "4"},
            ],
            [WITHOUT_ID, RESULT],
        ),
        ([{"role": "function", "name": "f", "content": "4"}], [RESULT | {"name": "f"}]),
        (
            [{"role": "assistant", "content": "a", "thinking": "r", "reasoning": "r"}],
            [A | {"reasoning_content": "r"}],
        ),
        (
            [{"role": "assistant", "content": None, "reasoning": "r"}],
            [A | {"content": "", "reasoning_content": "r"}],
        ),
        (
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}, "a"]}],
            [A | {"reasoning_content": "r"}],
        ),
    ],
)
def test_tool_calls_and_thoughts_have_one_form(tmp_path, turns, expected):
    assert read(tmp_path, {"conversations": [Q, *turns]}) == {"messages": [Q, *expected]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_beside_an_answer_are_its_own(tmp_path, name):
    thought = [Q, A | {"reasoning_content": "r"}]
    for row in (
        {"prompt": "q", "response": "a", name: "r"},
        {"input": [Q], "output": "a", name: "r"},
        {"question": "q", "answer": "", name: "r"},
        {"conversation": [{"input": "q", "output": "a", name: "r"}]},
    ):
        answer = {"content": row.get("answer", "a")}
        assert read(tmp_path, row) == {"messages": [Q, thought[1] | answer]}
    for setting in ("on", "off", True, 0, 2.5):
        unused: list[str] = []
        assert canonical({"input": [Q], "output": "a", name: setting}, unused) == {
            "messages": [Q, A]
        }
        assert unused == [name]
    with pytest.raises(
        DataError, match=r"the reasoning of message 2 \(assistant\) is \['r'\], not"
    ):
        canonical({"prompt": "q", "response": "a", name: ["r"]}, [])
    with pytest.raises(DataError, match="and they differ"):
        canonical({"prompt": "q", "response": "a", "thinking": "r", "reasoning": "s"}, [])


def test_tools_have_one_form(tmp_path):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}
    wrapped = [{"type": "function", "function": tool}]
    for tools in ({"tools": wrapped}, {"functions": [tool]}, {"tools": json.dumps([tool])}):
        assert read(tmp_path, {"messages": [Q, A]} | tools) == {
            "messages": [Q, A],
            "tools": wrapped,
        }
    assert read(tmp_path, {"messages": [Q, A], "tools": "[]"}) == {"messages": [Q, A]}
    both = read(
        tmp_path, {"messages": [Q, A], "tools": wrapped, "functions": [tool | {"name": "g"}]}
    )
    assert [found["function"]["name"] for found in both["tools"]] == ["f", "g"]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"instruction": "q", "input": {"a": 1}, "output": "a"}, r"'input' is \{'a': 1\}, not"),
        ({"instruction": "q", "input": 5, "output": "a"}, "'input' is 5, not text"),
        ({"messages": [Q, A], "text": "something else"}, "text and a chat"),
        ({"messages": [A | {"role": "user"}, A], "text": "user: a"}, "text and a chat"),
        ({"instruction": "i", "input": "in", "output": "a", "text": "# i\n# a"}, "text and a chat"),
        ({"instruction": "i", "input": "x", "output": "a", "text": "a, i: x"}, "text and a chat"),
        ({"text": "q", "completion": "a"}, "text and completion, and whether"),
        ({"text": "q", "answer": 7}, "text and answer, and whether"),
        ({"text": "q", "output": "a", "response": "a"}, "text and output, and whether"),
        ({"question": "q", "answers": []}, r"'answers' is \[\]"),
        ({"prompt": "q", "completion": ""}, r"message 2 \(assistant\) has the content ''"),
        ({"system": "s", "system_prompt": "t", "prompt": "q", "completion": "a"}, "keep one"),
        ({"conversation": [{"input": "q", "output": "a"}, {"system": "s", "input": "q",
          "output": "a"}]}, "turn 2 has a system prompt of its own"),
        ({"instruction": "q", "output": "a", "history": [["q", "a", "b"]]}, "'history' is"),
        ({"messages": [Q, A], "tools": [{"name": "f", "\ud800": 1}]}, "lone surrogate"),
        ({"messages": [Q, A], "documents": [{"text": "\ud800"}]}, "lone surrogate"),
        ({"messages": [Q, A | {"train": "1"}]}, "train '1'; a turn is trained"),
        ({"messages": [Q, A | {"content": [{"type": "thinking", "thinking": "r"}] * 2}]},
         "part of the type 'thinking'"),
        ({"messages": [Q, A], "conversations": [Q, Q]}, "messages and conversations, which differ"),
        ({"messages": [S, Q, A], "system": "other"}, "system beside another system prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "not preferred"),
        ({"chosen": [Q, A], "rejected": [Q, A]}, "not preferred"),
        ({"chosen": "q a", "rejected": "q b"}, "not preferred"),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "not preferred"),
        ({"query": "q", "response": "a", "rejected_response": "b"}, "not preferred"),
        ({"conversations": [Q], "chosen": A, "rejected": A}, "not preferred"),
        ({"question": "q", "answers": ["a", "b"]}, r"'answers' is \['a', 'b'\]"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "content 1"),
        ({"text": "a", "role": "prompter", "parent_id": "x", "message_id": "y"}, "tree"),
        ({"instruction": "q", "output": "a", "history": ["q", "a"]}, "'history' is"),
        ({"messages": ["q", "a"]}, "where a message belongs"),
        ({"messages": [{"role": "user", "from": "gpt", "content": "x"}]}, "role and from, and"),
        ({"messages": [A | {"value": "b"}]}, "content and value, and they differ"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
            "part of the type 'image_url'; only text",
        ),
        ({"messages": [Q, A | {"tool_calls": [{"id": "1"}]}]}, "a call of a tool is"),
        ({"messages": [Q | {"tool_calls": [ASK]}]}, "only an assistant calls tools"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "function_call {}"),
        ({"messages": [Q, A], "tools": [{"x": 1}]}, "no tool with a name"),
        ({"messages": [Q, A], "documents": "d"}, "'documents' is 'd', not a list"),
        ({"messages": [Q, A | {"tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}]},
         "lone surrogate"),
        ({"messages": [Q, A | {"weight": 0.5}]}, r"weight 0\.5; a turn is trained"),
        ({"messages": [Q, A], "weight": 2}, "the row has weight 2"),
        ({"messages": [Q, A | {"content": [{"type": "text", "text": "a", "train": False}]}]},
         r"a part of message 2 \(assistant\) has train False: which part"),
        ({"messages": [Q, A], "loss_mask": [1]}, "loss_mask with 1 entries and 2 messages"),
        ({"messages": [Q, A], "loss_mask": [0, 0.5]}, r"an entry of loss_mask .* has .*0\.5"),
        ({"text": "t", "loss_mask": [0, 1]}, r"the row has loss_mask \[0, 1\]"),
        ({"text": "t", "train": "false"}, "the row has train 'false'; a turn is trained"),
    ],
)  # fmt: skip
def test_what_is_not_one_thing_is_named(tmp_path, row, found):
    path = write(tmp_path / "a.jsonl", {"text": "good"}, row)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{found}"):
        load_rows(path)


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": "a"}, {"messages": [Q, A]}, {"chosen": [Q, A]}]
)
def test_answers_that_are_labeled_bad_are_refused(tmp_path, row, name):
    for bad in (False, 0, 0.0, "False", "false", "0"):
        with pytest.raises(DataError, match="not preferred"):
            canonical(row | {name: bad}, [])
    for good in (True, 1, "True", None, "", []):
        assert read(tmp_path, row | {name: good}) == {"messages": [Q, A]}


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": "a"}, {"input": "q", "output": "a"}])
@pytest.mark.parametrize("name", ["data", "rows", "chat"])
def test_rows_within_a_row_are_not_taken_for_turns(tmp_path, name, row):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({name: [row], "version": 1}))
    with pytest.raises(
        DataError, match=f"shape with {name}, version; if the rows are what '{name}"
    ):
        load_rows(path)
    assert read(tmp_path, {"prompt": "q", "completion": "a", name: [{"x": 1}]}) == {
        "messages": [Q, A]
    }


def test_fields_that_are_not_used_are_named_once_for_each_file(tmp_path, caplog):
    rows = [{"messages": [Q | {"lang": "en"}, A], "source": "x", "n": 0}] * 3
    write(tmp_path / "a.jsonl", *rows, {"messages": [Q, A], "source": None, "tags": [], "n": None})
    write(tmp_path / "b.jsonl", {"prompt": "q", "completion": "a", "Origin": "x"})
    write(tmp_path / "c.jsonl", {"text": "t", "meta": {}, "other": ""})
    with caplog.at_level(logging.WARNING, "sparsecraft"):
        load_rows(tmp_path)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("a.jsonl: fields that are not used, and in how many rows: "
                          "messages[].lang (3), n (3), source (3)")  # fmt: skip
    assert second.endswith("b.jsonl: fields that are not used, and in how many rows: Origin (1)")


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_turns_and_rows(tmp_path, name):
    for value in (0, 0.0, False):
        row = read(tmp_path, {"messages": [Q | {name: value}, A | {name: value}, Q, A]})
        assert [m.get("train") for m in row["messages"]] == [None, False, None, None]
        row = read(tmp_path, {"conversation": [{"input": "q", "output": "a", name: value}]})
        assert [m.get("train") for m in row["messages"]] == [None, False]
        row = read(tmp_path, {"messages": [Q, A, Q, A], "system": "s", name: [value, value, 0, 1]})
        assert [m.get("train") for m in row["messages"]] == [None, None, False, None, None]
        for shape in ({"messages": [Q, A]}, {"text": "t"}, {"text": "t", "label": 1}):
            assert read(tmp_path, shape | {name: value})["train"] is False
    for value in (1, 1.0, True, None, "", []):
        assert read(tmp_path, {"messages": [Q, A | {name: value}], name: value}) == {
            "messages": [Q, A]
        }
    for value in (0.5, 2, "false", [1]):
        with pytest.raises(DataError, match=rf"message 2 \(assistant\) has {name} .*; a turn is"):
            canonical({"messages": [Q, A | {name: value}]}, [])


@pytest.mark.parametrize("name", ["masked", "ignore_loss"])
def test_words_that_deny_training(tmp_path, name):
    for value in (1, True):
        row = read(tmp_path, {"messages": [Q | {name: value}, A | {name: value}, Q, A]})
        assert [m.get("train") for m in row["messages"]] == [None, False, None, None]
    for value in (0, False, None, ""):
        assert read(tmp_path, {"messages": [Q, A | {name: value}]}) == {"messages": [Q, A]}


@pytest.mark.parametrize("name", [*FLAGS, "masked", "ignore_loss", "mask", "train_detail"])
def test_flags_of_parts_of_an_answer_are_refused(name):
    part = {"type": "text", "text": "a"}
    for value in (0, 1, False, True, 0.5):
        with pytest.raises(DataError, match=rf"a part of message 2 .* has {name} .*: which part"):
            canonical({"messages": [Q, A | {"content": [part | {name: value}]}]}, [])
    assert canonical({"messages": [Q, A | {"content": [part | {name: None}]}]}, []) == {
        "messages": [Q, A]
    }


@pytest.mark.parametrize("name", ["mask", "train_detail", "token_loss_mask"])
def test_masks_within_a_turn_are_refused(tmp_path, name):
    for value in (0, 0.0, False, 1, 0.5, True, "user", [0, 1]):
        with pytest.raises(DataError, match=rf"message 2 \(assistant\) has {name} .*: which part"):
            canonical({"messages": [Q, A | {name: value}]}, [])
    for value in (None, "", []):
        assert read(tmp_path, {"messages": [Q, A | {name: value}]}) == {"messages": [Q, A]}


def test_whatever_nothing_takes_is_named():
    part = {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}, "train": 1}
    call = {"arguments": {"x": 1}, "index": 0, "function": {"name": "f", "strict": True}}
    turns = [
        Q | {"content": [part], "loss_mask": 1, "masked": 0},
        A | {"tool_calls": [call], "unlearn": 1},
        {"input": "q", "output": "a", "need_eos_token": True},
    ]
    row = {"messages": turns, "loss_scale": [1] * 4, "assistant_masks": [0, 1], "mask": "User"}
    unused: list[str] = []
    assert all("train" not in message for message in canonical(row, unused)["messages"])
    assert sorted(set(unused)) == [
        "assistant_masks",
        "loss_scale[] (user)",
        "mask",
        "messages[].content[].cache_control",
        "messages[].content[].train",
        "messages[].loss_mask (user)",
        "messages[].masked (user)",
        "messages[].need_eos_token",
        "messages[].tool_calls[].arguments",
        "messages[].tool_calls[].index",
        "messages[].tool_calls[].strict",
        "messages[].unlearn",
    ]


# ------------------------------------------------------------------ files
def test_nulls_that_arrow_puts_into_structures_are_no_arguments(tmp_path):
    called = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": f}]}
        for f in ({"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "z"}})
    ]
    rows = [{"messages": [Q, call, A]} for call in called]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet").to_list() == rows
    # In JSON a null is what somebody wrote.
    call = called[0]["tool_calls"][0]["function"] | {"arguments": {"x": None}}
    row = {"messages": [Q, A | {"tool_calls": [{"type": "function", "function": call}]}]}
    assert read(tmp_path, row) == row


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' stands"),
        ('{"text": "a", "score": NaN}', "NaN is no number"),
        ('{"text": "a", "score": -Infinity}', "-Infinity is no number"),
    ],
)
def test_what_python_reads_in_silence_is_refused(tmp_path, line, found):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: .*{found}"):
        load_rows(path)
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "good"}},\n {line}]')
    with pytest.raises(DataError, match=rf"a\.json, row 2: .*{found}"):
        load_rows(path)
    path.write_text(line)
    with pytest.raises(DataError, match=rf"a\.json, row 1: .*{found}"):
        load_rows(path)


def test_marks_of_order_and_line_ends_of_windows(tmp_path):
    rows = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n'
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(rows)
        assert load_rows(tmp_path / name)["text"] == ["a", "b"]
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf[{"text": "a"}]\r\n')
    assert load_rows(tmp_path / "b.json")["text"] == ["a"]


def test_equal_choices_are_refused_and_other_fields_named(tmp_path, caplog):
    row = {"prompt": "p", "choices": ["a", "b"], "answer": 0, "subject": "x"}
    assert load_choices(write(tmp_path / "a.jsonl", row)) == [row]
    assert "subject (1)" in caplog.text
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: two of the choices are 'b'"):
        load_choices(write(tmp_path / "a.jsonl", row, row | {"choices": ["b", "a", "b"]}))
