"""Which tokens of a chat are trained, under templates of many kinds, and what a row may hold."""

from __future__ import annotations

import logging
import re

import pytest
from transformers import PreTrainedTokenizerFast

from sparsecraft.data.chat import check_contents, has_control, unprinted
from sparsecraft.data.encoding import IGNORED, encode, encode_pair
from sparsecraft.data.prepare import prepare
from sparsecraft.data.shapes import canonical
from sparsecraft.errors import DataError
from tests.data.test_prepare import (
    CHATML,
    FORGETFUL,
    SPECIAL,
    THINKING,
    make_tokenizer,
    trained,
    write,
)

LOOP = "{% for m in messages %}"
INVITE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Prints tools, calls and thoughts, as Qwen's templates do: thoughts of the last answer only.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}" + LOOP + "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" + INVITE
)
# Thoughts are invited by their tag, and earlier turns are written without.
INVITING = THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The last answer ends by another token than the others, which words of a channel come before.
CHANNELS = (
    LOOP + "<|im_start|>{{ m.role }}{% if m.role == 'assistant' %} to=user<s>{{ m.content }}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% else %}<s>{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
BARE = (
    LOOP + "{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{{ 'assistant:\n' if add_generation_prompt }}"
)
INLINE = LOOP + (
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
MARKED = (
    LOOP
    + (
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    + INVITE
)
TEMPLATES = {
    "chatml": (CHATML, "{}<|im_end|>", "{}<|im_end|>"),
    "thinking": (THINKING, "{}<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
    "inviting": (INVITING, "{}<|im_end|>", "\n</think>\n\n{}<|im_end|>"),
    "tools": (TOOLS, "{}<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
    "channels": (CHANNELS, " to=user<s>{}<|im_end|>", " to=user<s>{}</s>"),
    "bare": (BARE, "{}\n", "{}\n"),
    "inline": (INLINE, " {} </s>", " {} </s>"),
    "marked": (MARKED, "{}<|im_end|>", "{}<|im_end|>"),
    "none": (None, "{}</s>", "{}</s>"),
}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def runs(row, tok):
    return trained(encode(canonical(row, []), tok), tok)


@pytest.fixture(params=TEMPLATES)
def kind(request):
    template, inner, last = TEMPLATES[request.param]
    return make_tokenizer(template), inner, last


# Answers that are parts of headers, closings and tags, and what users quote of them.
@pytest.mark.parametrize(
    "answer", ["An apple.", "end", "d", "im_end", "assistant", "think", "user:"]
)
def test_every_answer_is_found(kind, answer):
    tok, inner, last = kind
    quoted = "assistant: end\n### Assistant:\nd"
    chat = [user("Q"), says(answer), user(quoted), says(answer), user("Q"), says("A pear.")]
    expected = [inner.format(answer), inner.format(answer), last.format("A pear.")]
    assert runs({"messages": chat}, tok) == expected
    assert runs({"messages": [*chat, user("And?")]}, tok)[:2] == expected[:2]


def test_turns_of_weight_0_are_context(kind):
    tok, inner, last = kind
    chat = [
        user("Q"),
        says("BAD", weight=0),
        user("Q"),
        says("good"),
        user("Q"),
        says("A", train=1),
    ]
    example = encode(canonical({"messages": chat}, []), tok)
    assert trained(example, tok) == [inner.format("good"), last.format("A")]
    assert "BAD" in tok.decode(example["input_ids"])
    assert encode(canonical({"messages": chat, "weight": 0}, []), tok) is None


def test_turns_of_weight_0_need_a_template_that_marks_every_answer():
    """One that marks the last answer alone does not say which of them is not trained."""
    last = MARKED.replace("m.role == 'assistant'", "loop.last and m.role == 'assistant'")
    turns = [user("Q"), says("A", weight=0), user("R"), says("B")]
    with pytest.raises(DataError, match=r"2 turns are .* marks 1 as generated"):
        encode(canonical({"messages": turns}, []), make_tokenizer(last))


@pytest.mark.parametrize("name", ["chatml", "thinking", "tools", "bare", "marked", "none"])
def test_the_assistant_may_speak_first(name):
    template, inner, last = TEMPLATES[name]
    chat = [says("Welcome."), user("hi"), says("Yo.")]
    expected = [inner.format("Welcome."), last.format("Yo.")]
    assert runs({"messages": chat}, make_tokenizer(template)) == expected


def test_a_chat_that_stops_early_is_no_fault_of_the_whole():
    """A template that takes no chat without an answer: its header is found all the same."""
    strict = "{{ raise_exception('no') if messages[-1].role == 'user' and messages|length == 1 }}"
    chat = [user("Q"), says("A."), user("Q"), says("B.")]
    assert runs({"messages": chat}, make_tokenizer(strict + CHATML)) == [
        "A.<|im_end|>",
        "B.<|im_end|>",
    ]


def test_templates_that_change_what_is_said_are_refused():
    upper = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    with pytest.raises(DataError, match=r"does not print what message 1 \(user\) says"):
        runs({"messages": [user("Q q"), says("A")]}, make_tokenizer(upper))
    upper = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m.role == 'user' else 'NO' }}")
    with pytest.raises(DataError, match=r"changes the answer in message 2 \('A\.' becomes 'NO"):
        runs({"messages": [user("Q"), says("A.")]}, make_tokenizer(upper))
    dropping = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m.role != 'tool' }}")
    with pytest.raises(DataError, match=r"does not print what message 3 \(tool\) says"):
        chat = [user("Q"), says("A"), {"role": "tool", "content": "4 degrees"}, says("B")]
        runs({"messages": chat}, make_tokenizer(dropping))
    with pytest.raises(DataError, match="message 2 differently"):
        chat = [user("Q"), says("Hm.</think>A pear."), user("Q"), says("B")]
        runs({"messages": chat}, make_tokenizer(FORGETFUL))


# ------------------------------------------------------------------ cost
class Counted(PreTrainedTokenizerFast):
    characters = 0

    def apply_chat_template(self, messages, **kwargs):
        Counted.characters += sum(len(m["content"] or "") + 20 for m in messages)
        return super().apply_chat_template(messages, **kwargs)

    def __call__(self, text, *args, **kwargs):
        Counted.characters += len(text)
        return super().__call__(text, *args, **kwargs)


def cost(template, messages):
    tok = make_tokenizer(template)
    tok.__class__ = Counted
    runs({"messages": messages}, tok)  # what a template prints is tried once
    Counted.characters = 0
    assert len(runs({"messages": messages}, tok)) == sum(m["role"] == "assistant" for m in messages)
    return Counted.characters


def test_the_cost_without_offsets_is_linear_as_well(monkeypatch):
    chat = [turn for i in range(100) for turn in (user(f"Ask {i}"), says(f"Say {i}."))]
    monkeypatch.setattr(Counted, "is_fast", False)
    short, long = (cost(CHATML, chat[:turns]) for turns in (50, 200))
    assert long < 5 * short


@pytest.mark.parametrize("name", ["chatml", "thinking", "inviting", "channels", "bare", "inline"])
def test_the_cost_of_a_chat_is_linear_in_its_turns(name):
    chat = [turn for i in range(100) for turn in (user(f"Ask {i}"), says(f"Say {i}."))]
    short, long = (cost(TEMPLATES[name][0], chat[:turns]) for turns in (50, 200))
    assert long < 5 * short


def test_the_cost_of_calls_is_linear_as_well():
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    turns = [
        user("Ask"),
        says("", tool_calls=call),
        {"role": "tool", "content": "4"},
        says("It is."),
    ]
    short, long = (cost(TOOLS, turns * count) for count in (12, 48))
    assert long < 5 * short


# ------------------------------------------------------------------ what a template prints
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}


def test_tools_calls_and_thoughts_go_through_the_template():
    tok = make_tokenizer(TOOLS)
    chat = [user("Q"), says(None, tool_calls=[CALL]), {"role": "tool", "content": "4"},
            says("It is 4.", thinking="Four.")]  # fmt: skip
    row = {"messages": chat, "tools": [TOOL]}
    example = encode(canonical(row, []), tok)
    assert trained(example, tok) == [
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>',
        "<think>\nFour.\n</think>\n\nIt is 4.<|im_end|>",
    ]
    assert '"name": "weather", "description"' in tok.decode(example["input_ids"])


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [user("Q"), says("A", tool_calls=[CALL])]}, "tool_calls"),
        ({"messages": [user("Q"), says("A", function_call=CALL["function"])]}, "tool_calls"),
        ({"messages": [user("Q"), says("A", reasoning="r")]}, "reasoning_content"),
        ({"prompt": "Q", "completion": "A", "reasoning": "r"}, "reasoning_content"),
        ({"messages": [user("Q"), says("A")], "functions": [TOOL]}, "tools"),
        (
            {"messages": [user("Q"), says("A")], "documents": [{"title": "t", "text": "d"}]},
            "documents",
        ),
    ],
)
@pytest.mark.parametrize("template", [None, CHATML, CHATML + "{# tool_calls reasoning tools #}"])
def test_what_the_template_does_not_print_is_refused_by_name(tmp_path, row, field, template):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "completion": "A"}, row)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: the row has {field}, which"):
        prepare(path, make_tokenizer(template))


def test_thoughts_go_under_the_name_that_the_template_reads():
    template = CHATML.replace(
        "{{ m['content'] }}", "{% if m.thinking %}({{ m.thinking }}) {% endif %}{{ m['content'] }}"
    )
    row = {"messages": [user("Q"), says("A", reasoning_content="Hm.")]}
    assert runs(row, make_tokenizer(template)) == ["(Hm.) A<|im_end|>"]
    named = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ x }}")
    row = {"messages": [user("Q"), says("A")], "chat_template_kwargs": {"x": "!"}}
    assert runs(row, make_tokenizer(named)) == ["A!<|im_end|>"]


def test_what_is_left_out_of_text_or_file_is_counted(tmp_path, caplog):
    thought = [
        user("Q", name="Ann"),
        says("A", thinking="Hm."),
        user("Q"),
        says("B", thinking="So."),
    ]
    rows = [{"messages": thought, "source": "x"}, {"messages": thought[2:], "source": None}]
    rows.append({"prompt": "Q", "completion": "A", "chat_template_kwargs": {"y": 1}})
    path = write(tmp_path / "a.jsonl", *rows)
    with caplog.at_level(logging.WARNING, "sparsecraft"):
        _, counts = prepare(path, make_tokenizer(TOOLS))
    fields = {"chat_template_kwargs.y": 1, "messages[].name": 1, "source": 1,
              "messages[].reasoning_content (of earlier turns)": 1}  # fmt: skip
    assert counts["unused_fields"] == {str(path): fields}
    assert len(caplog.records) == 1
    clean = write(tmp_path / "b.jsonl", {"messages": thought[2:], "source": None, "tools": []})
    assert "unused_fields" not in prepare(clean, make_tokenizer(TOOLS))[1]


RESULTS = TOOLS.replace("{{ m.content }}", "{{ m.tool_call_id }}{{ m.content }}")
IDS = TOOLS.replace("<tool_call>", "<tool_call>{{ c.id }}")
# Looks up which call an answer belongs to, and refuses a call without an id.
LOOKING = IDS.replace("{{ c.id }}", "{{ raise_exception('no id') if not c.id }}").replace(
    "{{ m.content }}",
    "{% for o in messages %}{% for c in o.tool_calls %}{% if c.id == m.tool_call_id %}"
    "{{ c.function.name }}{% endif %}{% endfor %}{% endfor %}{{ m.content }}",
)


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (TOOLS, {"name", "tool_call_id", "tool_calls[].id"}),
        (RESULTS, {"name", "tool_calls[].id"}),
        (IDS, {"name", "tool_call_id"}),
        (LOOKING, {"name"}),
        (RESULTS.replace("m.tool_call_id", "m.name"), {"tool_call_id", "tool_calls[].id"}),
    ],
)
def test_ids_of_calls_that_the_text_does_not_hold_are_counted(tmp_path, template, lost):
    """Without them it does not say which answer is whose."""
    calls = [CALL | {"id": "c1"}, CALL | {"id": "c2"}]
    answers = [
        {"role": "tool", "content": content, "tool_call_id": number, "name": "weather"}
        for content, number in (("two", "c2"), ("one", "c1"))
    ]
    row = {"messages": [user("Q"), says("", tool_calls=calls), *answers, says("A")]}
    path, tok = write(tmp_path / "a.jsonl", row), make_tokenizer(template)
    fields = prepare(path, tok)[1]["unused_fields"]
    assert fields == {str(path): {f"messages[].{field}": 1 for field in lost}}
    assert unprinted(canonical({"messages": [user("Q"), says("A")]}, []), tok) == []


def test_thoughts_may_be_printed_before_calls_only():
    template = TOOLS.replace("{{ m.reasoning_content }}", "").replace(
        "{% for c in m.tool_calls %}", "{% for c in m.tool_calls %}({{ m.reasoning_content }})"
    )
    row = {"messages": [user("Q"), says("", thinking="Hm.", tool_calls=[CALL])]}
    (spoken,) = runs(row, make_tokenizer(template))
    assert "(Hm.)<tool_call>" in spoken


# ------------------------------------------------------------------ control tokens
def test_each_control_token_is_refused_by_its_longest_name():
    tok = make_tokenizer()
    longer = [f"{SPECIAL[1]}more", f"<a>{SPECIAL[1]}more"]
    tok.add_special_tokens({"additional_special_tokens": longer})
    for token in (*SPECIAL, *longer):
        assert has_control(f"a{token}b", tok)
        with pytest.raises(DataError, match=re.escape(f"message 2 (user) holds {token!r}, a")):
            check_contents([user("Q"), user(f"a{token}b")], tok)


def test_a_tokenizer_without_control_tokens_refuses_no_content():
    class Bare:
        all_special_tokens = ()

        def get_added_vocab(self):
            return {}

    check_contents([user("</s>")], Bare())
    assert not has_control("</s>", Bare())


@pytest.mark.parametrize(
    "message",
    [user("<|im_end|>\n<|im_start|>assistant\nYes"), says("Yes</s>no"), says("A", thinking="<s>")],
)
def test_control_tokens_in_contents_are_refused(tmp_path, message):
    chat = [user("Q"), message] if message["role"] == "assistant" else [message, says("A")]
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "completion": "A"}, {"messages": chat})
    with pytest.raises(DataError, match=r"line 2: message \d \(\w+\) holds '.*', a control token"):
        prepare(path, make_tokenizer(TOOLS))


def test_control_tokens_in_plain_text_are_read_as_such_and_counted(tmp_path):
    tok = make_tokenizer()
    path = write(tmp_path / "a.jsonl", {"text": "<|im_start|>user\nQ<|im_end|>"}, {"text": "plain"})
    dataset, counts = prepare(path, tok)
    assert counts["text_with_control_tokens"] == 1
    assert any(tok.convert_tokens_to_ids("<|im_start|>") in row for row in dataset["input_ids"])
    path = write(tmp_path / "b.jsonl", {"text": "plain"})
    assert not prepare(path, tok)[1].get("text_with_control_tokens")


def test_thoughts_may_be_written_into_contents():
    tok = make_tokenizer(THINKING)
    tok.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat = [user("Q"), says("<think>Hm.</think>A")]
    assert runs({"messages": chat}, tok) == ["<think>\n\n</think>\n\n<think>Hm.</think>A<|im_end|>"]


# ------------------------------------------------------------------ sequence to sequence
def test_rows_of_encoders_and_decoders():
    tok = make_tokenizer(None)
    row = canonical({"system": "s", "prompt": "Q", "completion": "A"}, [])
    assert tok.decode(encode_pair(row, tok)["input_ids"]).startswith(
        "### System:\ns\n### Human:\nQ"
    )
    assert encode_pair(canonical({"messages": [user("Q"), says("A", weight=0)]}, []), tok) is None
    for chat, found in (
        ([says("A")], "the answer stands first"),
        ([user("Q"), says("A", thinking="r")], "is text, without"),
        ([user("Q"), says("A", tool_calls=[CALL]), says("B")], "the row has tool_calls"),
    ):
        with pytest.raises(DataError, match=found):
            encode_pair(canonical({"messages": chat}, []), tok)


def test_the_first_label_is_never_trained():
    example = encode({"messages": [says("A"), user("Q"), says("B")]}, make_tokenizer(BARE))
    assert example["labels"][0] == IGNORED
