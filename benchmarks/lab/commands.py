"""The command lines of the studies: options that they share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path


def study_options(
    parser: argparse.ArgumentParser, verbs: Mapping[str, Callable], folder: Path, data: str
) -> None:
    """What every study takes. `folder` holds its results and its page."""
    parser.add_argument("verb", choices=tuple(verbs))
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--results", type=Path, default=folder / "results.jsonl")
    parser.add_argument("--page", type=Path, default=folder / "README.md")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this")
    parser.add_argument("--tiny", action="store_true", help="random weights, a few steps: a trial")


def text_options(
    parser: argparse.ArgumentParser, verbs: Mapping[str, Callable], folder: Path, data: str
) -> None:
    """Those, and what the studies on text take, which keep trained weights."""
    study_options(parser, verbs, folder, data)
    parser.add_argument("--copy", type=Path, help="copy the results here after every row")
    cache = Path("runs") / folder.name
    parser.add_argument("--cache", type=Path, default=cache, help="trained weights")


def packed_options(
    parser: argparse.ArgumentParser,
    verbs: Mapping[str, Callable],
    folder: Path,
    *,
    data: str,
    steps: int,
    batch: int,
) -> None:
    """Those, and what the studies on packed chats take, one worker a GPU."""
    study_options(parser, verbs, folder, data)
    parser.add_argument("--model", default="smollm2", help="or `random`, `tiny`: random weights")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rows", type=int, help="only this many packs of each part, for a trial")
    parser.add_argument("--gpus", type=int, nargs="+", help="default: every visible one")
    parser.add_argument("--join", action="store_true", help="beside another `run` of these results")


def run_verb(parser: argparse.ArgumentParser, verbs: Mapping[str, Callable]) -> None:
    args = parser.parse_args()
    verbs[args.verb](args)
