"""The command line: a verb and its function. Nothing here that Python users cannot call too.

Heavy imports stand inside the functions, so that help comes at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from sparsecraft import budgeting, exchange, growing
from sparsecraft.errors import DataError, SparsecraftError, did_you_mean
from sparsecraft.options import TrainOptions, gathered
from sparsecraft.recipe import VERSION

Paths = tuple[str, ...]


def methods() -> None:
    """Show every recipe: paper, placement, experts, router, and whether it starts exactly."""
    from sparsecraft import recipes
    from sparsecraft.recipe import facts

    for name in recipes.__all__:
        recipe = recipes.by_name(name)()
        _say(f"{name}: {recipe.title}")
        for fact, value in facts(recipe).items():
            _say(f"  {fact:<16}{value}")


def convert(argv: list[str]) -> None:
    """Convert a dense model by a recipe and save it: convert RECIPE --model NAME --out DIR."""
    from sparsecraft import converting, recipes

    names = ", ".join(recipes.__all__)
    if argv in (["-h"], ["--help"]):
        return _say(
            "usage: sparsecraft convert RECIPE --model NAME --out DIR [options]\n\n"
            f"RECIPE is one of: {names}.\n"
            "`sparsecraft convert RECIPE --help` lists the options of one recipe,\n"
            "`sparsecraft methods` compares them."
        )
    if not argv or argv[0].startswith("-"):
        raise SparsecraftError(f"convert needs a recipe first: one of {names}.")
    function = recipes.by_name(argv[0])
    arguments, options = converting.parse(function, argv[1:])
    _quiet()
    if options.match_params:
        recipe = converting.match(function, arguments, options, recipes.by_name, _say)
    else:
        recipe = function(**arguments)
    converting.run(recipe, options, _say)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainOptions):
    """Train a converted model on chat, text or classification rows."""

    folder: Positional[str]
    """Checkpoint of a converted model."""
    data: Paths
    """Files, folders or hub datasets."""
    out: Path
    """Checkpoint folder to write."""
    resume: bool = False
    """Continue an interrupted run exactly."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""
    dtype: Literal["saved", "float32", "bfloat16"] = "saved"
    """Cast the frozen parameters; those that train are float32."""


def train(command: TrainCommand, say: Callable[[str], None]) -> None:
    """Train and save the model that a command names."""
    import torch

    from sparsecraft import checkpoint, training
    from sparsecraft.folder import check_free

    check_free(command.out, command.overwrite)
    model = checkpoint.load(command.folder)
    if command.dtype != "saved":
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, command.dtype))
    report = training.train(
        model,
        command.data,
        command.out,
        resume=command.resume,
        overwrite=command.overwrite,
        **command.of_training(),
    )
    say(f"{report}\nSaved and read back: {command.out}")


def evaluate(
    folder: Positional[str],
    data: Paths = (),
    choice: Paths = (),
    tasks: Paths = (),
    json: Path | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    budget: budgeting.Budget | None = None,
) -> None:
    """Held-out loss, rank classification and lm-eval tasks of a checkpoint or a dense model.

    Args:
        folder: checkpoint, or the name of a dense model.
        data: files to take the held-out loss on, each by itself.
        choice: files of rows prompt, choices, answer, template.
        tasks: names of lm-eval tasks.
        json: write all results to this file.
        limit: rows of each file at most.
        max_length: longer rows are dropped and counted.
        budget: share of experts of a split model to run, or `recipe`; otherwise as saved.
    """
    import json as json_module

    from rich.console import Console

    from sparsecraft import evaluation, generation
    from sparsecraft.analysis.report import result_tables

    _quiet()
    if json and not (json.absolute().parent.is_dir() and not json.is_dir()):
        raise DataError(f"--json {json} cannot be written; name a file in an existing folder.")
    if not (data or choice or tasks):
        raise DataError("There is nothing to evaluate on; pass --data, --choice or --tasks.")
    model, tokenizer = generation.load_any(folder)
    budgeting.set_for(model, budget)
    results = evaluation.evaluate(
        model, data or None, choices=choice, tasks=tasks, tokenizer=tokenizer,
        max_length=max_length, limit=limit,
    )  # fmt: skip
    for table in result_tables(results):
        Console().print(table)
    for key, value in results.get("routing", {}).items():
        _say(f"{key}: {value:.3f}")
    if json:
        json.write_text(json_module.dumps(results, indent=2, default=str, allow_nan=False) + "\n")


def generate(
    folder: Positional[str],
    prompt: str,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    stream: bool = False,
    seed: int = 0,
    budget: budgeting.Budget | None = None,
) -> None:
    """Answer one prompt.

    Args:
        folder: checkpoint, or the name of a dense model.
        prompt: the user's message.
        system: a system message before it.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        stream: print tokens as they come.
        seed: of sampling.
        budget: share of experts of a split model to run, or `recipe`; otherwise as saved.
    """
    from sparsecraft import generation

    _quiet()
    model, tokenizer = generation.load_generator(folder)
    budgeting.set_for(model, budget)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "stream": stream}
    text = generation.answer(model, tokenizer, messages, seed=seed, **options)
    if not stream:
        print(text)


def chat(
    folder: Positional[str],
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    budget: budgeting.Budget | None = None,
) -> None:
    """Talk with a model; an empty line ends it.

    Args:
        folder: checkpoint, or the name of a dense model.
        system: a system message before the conversation.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        budget: share of experts of a split model to run, or `recipe`; otherwise as saved.
    """
    from sparsecraft import generation

    _quiet()
    model, tokenizer = generation.load_generator(folder)
    budgeting.set_for(model, budget)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        print("model: ", end="", flush=True)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        text = generation.answer(model, tokenizer, messages, stream=True, **options)
        messages.append({"role": "assistant", "content": text})


def show(folder: Positional[str]) -> None:
    """What a checkpoint is: parameters, exactness, base, training, routing.

    Args:
        folder: checkpoint of a converted model.
    """
    from sparsecraft.analysis.report import describe

    _quiet()
    _say("\n".join(describe(folder)))


def merge(
    folder: Positional[str],
    out: Path,
    how: Literal["exact", "fixed", "average"] = "exact",
    weights: str | None = None,
    data: Paths = (),
    partial: bool = False,
    budget: budgeting.Budget | None = None,
    overwrite: bool = False,
) -> None:
    """Merge the experts of a checkpoint into dense weights, or into one adapter.

    Args:
        folder: checkpoint of a converted model.
        out: folder to write; of a plain transformers model where no layer is left.
        how: exact; fixed, with the routing frozen to `--weights`; average, an approximation.
        weights: for fixed: 0.5,0.3,0.2 for the experts of every layer, or `measured` on the data.
        data: held-out files; their loss before and after is printed.
        partial: merge what can be merged and keep the other layers, instead of refusing.
        budget: of a split model before the merge: 1.0, its dense function, is what can be merged.
        overwrite: replace an existing folder once the new one is complete.
    """
    from sparsecraft import generation, merging
    from sparsecraft.folder import check_free

    _quiet()
    given = merging.read_weights(weights)
    check_free(out, overwrite)
    model, tokenizer = generation.load_any(folder)
    budgeting.set_for(model, budget)
    report = merging.merge(
        model, how, weights=given, data=data or None, tokenizer=tokenizer, partial=partial
    )
    merging.write_merged(model, out, report, source=folder, overwrite=overwrite)
    _say(f"{report}\nSaved and read back: {out}")


def demo(out: Path = Path("runs/demo"), steps: int = 60, seed: int = 0) -> None:
    """SmolLM2 becomes an 8-expert PESC model, learns three domains, and answers. No GPU needed.

    Args:
        out: folder for data and checkpoints.
        steps: optimizer steps of training.
        seed: of data, new parameters and training.
    """
    from sparsecraft.demo import run

    _quiet()
    run(out, steps, seed, _say)


# A function with its arguments; or a command's options, and what runs it.
VERBS: dict[str, Callable | tuple[type, Callable]] = {
    "methods": methods,
    "convert": convert,
    "train": (TrainCommand, train),
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "inspect": show,
    "export": (exchange.ExportCommand, exchange.run_export),
    "import": (exchange.ImportCommand, exchange.run_import),
    "extend": (growing.ExtendCommand, growing.run_extend),
    "remove": (growing.RemoveCommand, growing.run_remove),
    "merge": merge,
    "calibrate": (budgeting.CalibrateCommand, budgeting.run_calibrate),
    "sweep": (budgeting.SweepCommand, budgeting.run_sweep),
    "demo": demo,
}


def _run(verb: str, argv: list[str]) -> None:
    target = VERBS[verb]
    if target is convert:  # whose options depend on the recipe
        convert(argv)
    elif isinstance(target, tuple):
        options, run = target
        command = _parse(options, verb, argv)
        _quiet()
        run(command, _say)
    else:
        _parse(target, verb, argv)


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


def _parse(target: Callable, verb: str, argv: list[str]) -> Any:
    return tyro.cli(target, prog=f"sparsecraft {verb}", args=gathered(argv))


def _quiet() -> None:
    """No bars and notes of other libraries: our own lines and the training bar say enough."""
    from transformers.utils import logging as transformers_logging

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when datasets is first imported
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
        print(text, flush=True)
