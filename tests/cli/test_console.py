"""How options are read, and what errors say."""

from __future__ import annotations

import importlib

import pytest

from sparsecraft.cli.console import gathered, in_flags, quiet


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("D --set a=1 --out O --set b=2 c=3", "D --set a=1 b=2 c=3 --out O"),
        ("D --data=x --data y", "D --data x y"),
        ("D --prompt=--help --seed 1 --seed 2", "D --prompt=--help --seed 1 --seed 2"),
        ("--limit 3 D --flag=False", "--limit 3 D --flag=False"),
    ],
)
def test_only_options_of_several_values_are_gathered(given, wanted):
    assert gathered(given.split()) == wanted.split()
    assert gathered(["--prompt", "-- a = b", "--system", ""]) == [
        "--prompt",
        "-- a = b",
        "--system",
        "",
    ]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (
            "top_k is 9 with num_experts=8; it lies between 1 and num_experts.",
            "--top-k is 9 with --num-experts 8; it lies between 1 and --num-experts.",
        ),
        ("pass unrelated=True (--unrelated) to join", "pass --unrelated to join"),
        ("pass --resume (resume=True) to go on", "pass --resume to go on"),
        ("give domains=[...] or data=... (--domains, --data).", "give --domains or --data."),
        (
            "weights='measured' needs data; pass data=...",
            "--weights 'measured' needs data; pass --data",
        ),
        ("use resume=False or paths='encoder.*'.", "use --no-resume or --paths 'encoder.*'."),
        ("data is a list.", "--data is a list."),
        ("data holds 'x', which", "--data holds 'x', which"),
        ("exists already; pass resume.", "exists already; pass --resume."),
        ("rank=4.5, lora_rank=8", "--rank 4.5, --lora-rank 8"),
    ],
)
def test_errors_name_flags(said, wanted):
    names = "top_k num_experts unrelated resume domains data weights paths rank lora_rank".split()
    assert in_flags(said, names) == wanted


@pytest.mark.parametrize(
    "said",
    [
        "The data is short, and its rank is low; pass data of another rank.",
        "router.top_k=3, 'top_k', `top_k` and /models/top_k/top_k.json",
        "select.kind is 'hard'. Known: sample, slots, soft, top_k.",
        "Known: num_experts_per_token, modalities=False, tokenizer=...",
    ],
)
def test_errors_keep_words_that_are_no_arguments(said):
    assert in_flags(said, ("top_k", "num_experts", "data", "rank")) == said


def test_what_peft_imports_unasked_says_nothing(caplog):
    """The logger is the one that bitsandbytes warns by."""
    name = "bitsandbytes.backends.cpu.ops"
    pytest.importorskip("bitsandbytes", reason="needs sparsecraft[quant]")
    logger = importlib.import_module(name).logger
    before = logger.level
    try:
        quiet()
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
        assert logger.name == name and not caplog.records
        logger.error("an error is still said")
        assert len(caplog.records) == 1
    finally:
        logger.setLevel(before)
