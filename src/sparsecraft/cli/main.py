"""The command line: a verb and its function. Nothing here that Python users cannot call too.

Heavy imports stand inside the functions, so that help comes at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sparsecraft.cli.budget import CalibrateCommand, SweepCommand, run_calibrate, run_sweep
from sparsecraft.cli.chat import chat, generate
from sparsecraft.cli.console import parse, quiet, say
from sparsecraft.cli.evaluate import evaluate
from sparsecraft.cli.extend import ExtendCommand, RemoveCommand, run_extend, run_remove
from sparsecraft.cli.inspect import methods, show
from sparsecraft.cli.interop import ExportCommand, ImportCommand, run_export, run_import
from sparsecraft.cli.merge import merge
from sparsecraft.cli.train import TrainCommand, train
from sparsecraft.errors import SparsecraftError, did_you_mean
from sparsecraft.recipe.formats import VERSION


def convert(argv: list[str]) -> None:
    """Convert a dense model by a recipe and save it: convert RECIPE --model NAME --out DIR."""
    from sparsecraft import recipes
    from sparsecraft.cli.convert import match, parse
    from sparsecraft.cli.convert import run as run_convert

    names = ", ".join(recipes.__all__)
    if argv in (["-h"], ["--help"]):
        return say(
            "usage: sparsecraft convert RECIPE --model NAME --out DIR [options]\n\n"
            f"RECIPE is one of: {names}.\n"
            "`sparsecraft convert RECIPE --help` lists the options of one recipe,\n"
            "`sparsecraft methods` compares them."
        )
    if not argv or argv[0].startswith("-"):
        raise SparsecraftError(f"convert needs a recipe first: one of {names}.")
    function = recipes.by_name(argv[0])
    arguments, options = parse(function, argv[1:])
    quiet()
    if options.match_params:
        recipe = match(function, arguments, options, recipes.by_name, say)
    else:
        recipe = function(**arguments)
    run_convert(recipe, options, say)


def demo(out: Path = Path("runs/demo"), steps: int = 60, seed: int = 0) -> None:
    """SmolLM2 becomes an 8-expert PESC model, learns three domains, and answers. No GPU needed.

    Args:
        out: folder for data and checkpoints.
        steps: optimizer steps of training.
        seed: of data, new parameters and training.
    """
    from sparsecraft.cli.demo import run

    quiet()
    run(out, steps, seed, say)


# A function with its arguments; or a command's options, and what runs it.
VERBS: dict[str, Callable | tuple[type, Callable]] = {
    "methods": methods,
    "convert": convert,
    "train": (TrainCommand, train),
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "inspect": show,
    "export": (ExportCommand, run_export),
    "import": (ImportCommand, run_import),
    "extend": (ExtendCommand, run_extend),
    "remove": (RemoveCommand, run_remove),
    "merge": merge,
    "calibrate": (CalibrateCommand, run_calibrate),
    "sweep": (SweepCommand, run_sweep),
    "demo": demo,
}


def _run(verb: str, argv: list[str]) -> None:
    target = VERBS[verb]
    if target is convert:  # whose options depend on the recipe
        convert(argv)
    elif isinstance(target, tuple):
        options, run = target
        command = parse(options, verb, argv)
        quiet()
        run(command, say)
    else:
        parse(target, verb, argv)


def _about(verb: str) -> str:
    """The first line of a verb's help."""
    target = VERBS[verb]
    documented = target[0] if isinstance(target, tuple) else target
    return documented.__doc__.splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status. Errors of ours are one sentence on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {verb:<11}{_about(verb)}" for verb in VERBS)
        print(
            f"usage: sparsecraft VERB [options]\n\n{lines}\n\nsparsecraft VERB --help tells more."
        )
        return 0
    if argv[0] == "--version":
        print(VERSION)
        return 0
    verb, *rest = argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sparsecraft").setLevel(logging.INFO)
    try:
        if verb not in VERBS:
            raise SparsecraftError(f"Unknown verb {verb!r}." + did_you_mean(verb, VERBS))
        _run(verb, rest)
    except BrokenPipeError:  # `sparsecraft methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SparsecraftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; training with a saved state goes on by --resume", file=sys.stderr)
        return 130
    return 0
