"""The command line: a verb, the class of its options, and `run` beside that class.

Nothing here that Python users cannot call too. A verb's file is imported when the verb is asked
for: `sparsecraft --help` imports no verb, `sparsecraft VERB --help` one, and neither imports torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

from sparsecraft.cli.console import Command, in_flags, quiet, say
from sparsecraft.errors import SparsecraftError, did_you_mean
from sparsecraft.recipe.formats import VERSION

# Verb -> file and class, and the first line of the class's docstring (a test compares them).
VERBS: dict[str, tuple[str, str]] = {
    "methods": (
        "methods:MethodsCommand",
        "Show every recipe: paper, placement, experts, router, and whether it starts exactly.",
    ),
    "convert": (
        "convert:ConvertCommand",
        "Convert a dense model by a recipe and save it: convert RECIPE --model NAME --out DIR.",
    ),
    "train": (
        "train:TrainCommand",
        "Train a converted model on chat, text or classification rows.",
    ),
    "eval": (
        "evaluate:EvaluateCommand",
        "Held-out loss, rank classification and lm-eval tasks of a checkpoint or a dense model.",
    ),
    "analyze": (
        "analyze:AnalyzeCommand",
        "What experts or neurons do, beside what chance gives, or what a training did: one page.",
    ),
    "compare": (
        "compare:CompareCommand",
        "Several models on the same rows: loss with intervals, parameters, FLOPs, memory, speed.",
    ),
    "generate": ("generate:GenerateCommand", "Answer one prompt."),
    "chat": ("chat:ChatCommand", "Talk with a model; an empty line ends it."),
    "inspect": (
        "inspect:InspectCommand",
        "What a checkpoint is: parameters, exactness, base, training, routing.",
    ),
    "export": (
        "export:ExportCommand",
        "Write a checkpoint in a standard architecture that loads without sparsecraft.",
    ),
    "import": (
        "importing:ImportCommand",
        "Read a standard mixture that was made elsewhere, and save it as a converted model.",
    ),
    "extend": (
        "extend:ExtendCommand",
        "Add a dense model as one more expert of every layer, and train shortly on new and old "
        "data.",
    ),
    "remove": ("remove:RemoveCommand", "Take one expert out of every layer."),
    "merge": (
        "merge:MergeCommand",
        "Merge the experts of a checkpoint into dense weights, or into one adapter.",
    ),
    "calibrate": (
        "calibrate:CalibrateCommand",
        "Find the threshold, or number of experts, for a share of the FLOPs, and save it.",
    ),
    "sweep": (
        "sweep:SweepCommand",
        "Draw score and latency of a split model against its FLOPs, over budgets.",
    ),
    "demo": (
        "demo:DemoCommand",
        "SmolLM2 becomes an 8-expert PESC model, learns three domains, and answers. No GPU needed.",
    ),
}


def _run(verb: str, argv: list[str]) -> None:
    """Read a verb's options and do what they ask."""
    if verb not in VERBS:
        raise SparsecraftError(f"Unknown verb {verb!r}." + did_you_mean(verb, VERBS))
    file, _, name = VERBS[verb][0].partition(":")
    module = importlib.import_module(f"sparsecraft.cli.{file}")
    command: Command = getattr(module, name).read(verb, argv)
    if not command.light:
        quiet()
    try:
        with _enough_memory(verb, command):
            module.run(command, say)
    except SparsecraftError as error:
        raise SparsecraftError(in_flags(str(error), command.option_names())) from error


def _enough_memory(verb: str, command: Command) -> AbstractContextManager[None]:
    """One sentence where memory runs out beside the work that says itself what to lower."""
    if command.light:
        return nullcontext()
    from sparsecraft.dense.memory import enough_memory

    otherwise = "load the model in a smaller type (--dtype, where there is it), or run it elsewhere"
    return enough_memory(f"sparsecraft {verb}", otherwise)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status. Errors of ours are one sentence on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {verb:<11}{about}" for verb, (_, about) in VERBS.items())
        print(f"usage: sparsecraft VERB [options]\n\n{lines}\n\nsparsecraft VERB --help says more.")
        return 0
    if argv[0] == "--version":
        print(VERSION)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sparsecraft").setLevel(logging.INFO)
    try:
        with _ended_cleanly():
            _run(argv[0], argv[1:])
    except BrokenPipeError:  # `sparsecraft methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SparsecraftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        more = "; it goes on by --resume from its last state, if any" if argv[0] == "train" else ""
        print(f"interrupted{more}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)
    return 0


class Ended(KeyboardInterrupt):
    """A signal asks the process to end: what is half done is taken away, as after Ctrl-C."""

    def __init__(self, number: int):
        self.number = number


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, which schedulers and closing terminals send, end a block like Ctrl-C.

    Not where Python takes no signals, nor in the later of torchrun's processes: they write nothing,
    and would wait in a collective operation for those that have ended.
    """
    names = ("SIGTERM", "SIGHUP")  # Windows has the first alone
    numbers = [number for number in signal.valid_signals() if getattr(number, "name", "") in names]
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or os.environ.get("RANK", "0") != "0":
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        raise Ended(number)

    # What is ignored stays so: nohup ignores SIGHUP.
    asked = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    before = {number: signal.signal(number, end) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
