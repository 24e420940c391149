"""What the commands say, and how they read their options."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tyro

from sparsecraft.cli.options import gathered


def parse(target: Callable, verb: str, argv: list[str]) -> Any:
    return tyro.cli(target, prog=f"sparsecraft {verb}", args=gathered(argv))


def quiet() -> None:
    """No bars and notes of other libraries: our own lines and the training bar say enough."""
    from transformers.utils import logging as transformers_logging

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when datasets is first imported
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
        print(text, flush=True)
