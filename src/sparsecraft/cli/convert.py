"""`sparsecraft convert`: a recipe's parameters as options, the conversion from needs to disk."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from sparsecraft import recipes
from sparsecraft.cli.console import Command, Say, parse, say
from sparsecraft.cli.options import Paths
from sparsecraft.cli.recipe import matched, options_of
from sparsecraft.errors import SparsecraftError
from sparsecraft.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What `sparsecraft convert` takes beside the recipe's own parameters."""

    model: str
    """Local folder, hub id, or the packaged `smollm2`."""
    out: Path
    """Checkpoint folder to write."""
    sources: Paths = ()
    """Dense models of one ancestor with `--model` that give the experts; or PEFT LoRAs."""
    unrelated: bool = False
    """Join sources even if they have no common ancestor, LoRAs even if trained on another base."""
    domains: Paths = ()
    """Files or data sets that the routers start from, one for each expert, in their order."""
    prompts: tuple[str, ...] = ()
    """Prompts instead of `--domains`, one argument for each expert: `one|another|a third`."""
    data: Paths = ()
    """Files whose rows enter the certificate beside random tokens."""
    set: tuple[str, ...] = ()
    """Deeper fields of the recipe, such as `router.temperature=0.5`."""
    match_params: str | None = None
    """Rank or width that trains as many parameters as `mov`, `molora:num_experts=5,rank=4`, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the dense model; auto keeps its own."""
    device: str = "cpu"
    """Where to convert."""
    standalone: bool = False
    """Hold the base's tensors too, so that the folder needs nothing else."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""
    seed: int = 0
    """Of the new parameters."""
    certify: bool = True
    """Measure how far the converted model is from the dense one."""
    shard_size: float = 5.0
    """Gigabytes (10^9 bytes) of one file; larger checkpoints are several files with an index."""
    stream: bool = False
    """Convert tensor by tensor, if the model does not fit into memory; certify layer by layer."""
    resume: bool = False
    """Of `--stream`: go on with an interrupted conversion."""
    progress: bool = True
    """Of `--stream`: show a progress bar on standard error."""


@dataclass(frozen=True, kw_only=True)
class ConvertCommand(Command):
    """Convert a dense model by a recipe and save it: convert RECIPE --model NAME --out DIR."""

    recipe: Callable[..., Recipe]
    """The recipe's function, whose parameters are options, too."""
    arguments: dict[str, Any]
    """What it is called with."""
    options: ConvertOptions
    """What every recipe takes."""

    @classmethod
    def read(cls, verb: str, argv: list[str]) -> Self:
        """The recipe that the first word names, its arguments and the options of every recipe."""
        names = ", ".join(recipes.__all__)
        if argv in (["-h"], ["--help"]):
            say(USAGE.format(names=names))
            raise SystemExit(0)
        if not argv or argv[0].startswith("-"):
            raise SparsecraftError(f"convert needs a recipe first: one of {names}.")
        function = recipes.by_name(argv[0])
        name = f"{verb} {function.__name__}"
        options = parse(options_of(function, ConvertOptions), name, argv[1:])
        flags = (word.partition("=")[0] for word in argv[1:] if word.startswith("--"))
        given = {flag[2:].replace("-", "_") for flag in flags}
        return cls(recipe=function, arguments=_arguments(function, options, given), options=options)

    def option_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(self.options))


USAGE = """\
usage: sparsecraft convert RECIPE --model NAME --out DIR [options]

RECIPE is one of: {names}.
`sparsecraft convert RECIPE --help` lists the options of one recipe,
`sparsecraft methods` compares them."""


def _arguments(function: Callable, options: ConvertOptions, given: set[str]) -> dict[str, Any]:
    """The recipe's arguments; if not given, number of experts and rank follow the sources."""
    parameters = inspect.signature(function).parameters
    arguments = {name: getattr(options, name) for name in parameters}
    each = options.sources or options.domains or options.prompts
    if each and "num_experts" in parameters.keys() - given and not arguments.get("expand"):
        arguments["num_experts"] = len(each)
    rank = next((name for name in ("rank", "lora_rank") if name in parameters.keys() - given), None)
    if options.sources and rank and not options.match_params:
        from sparsecraft.conversion.sources.lora_experts import largest_rank

        arguments[rank] = largest_rank(options.sources) or arguments[rank]
    return arguments


def run(command: ConvertCommand, say: Say) -> None:
    """Say what is needed, load, convert, certify, save."""
    from sparsecraft.checkpoint.replacing import claimed

    options = command.options
    recipe = _recipe(command, say)
    dtype = _checked(options)
    if options.stream:
        return _stream(recipe, options, dtype, say)
    if options.resume:
        raise SparsecraftError("--resume is for --stream; other conversions write at their end.")
    with claimed(options.out, options.overwrite):
        _convert(recipe, options, dtype, say)


def _recipe(command: ConvertCommand, say: Say) -> Recipe:
    """The command's recipe, of the size that `--match-params` asks for, with `--set` applied."""
    from sparsecraft.recipe.overrides import override

    options = command.options
    if options.match_params:
        found = matched(
            command.recipe, command.arguments, options.match_params, options.set, options.model
        )
        say(str(found))
        recipe = found.recipe
    else:
        recipe = command.recipe(**command.arguments)
    for text in options.set:
        if "=" not in text:
            raise SparsecraftError(f"--set takes field=value; {text!r} has no '='.")
    return override(recipe, dict(text.split("=", 1) for text in options.set))


def _checked(options: ConvertOptions) -> Any:
    """The dtype asked for, None as it is; refuses a folder that is there, a device that is not."""
    import torch

    from sparsecraft.checkpoint.folder import check_free

    check_free(options.out, options.overwrite)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SparsecraftError(
            f"--device {options.device}: torch sees no such device here; use cpu."
        )
    return None if options.dtype == "auto" else getattr(torch, options.dtype)


def _convert(recipe: Recipe, options: ConvertOptions, dtype: Any, say: Say) -> None:
    """Convert a model in memory, and save it."""
    from sparsecraft.checkpoint.companions import check_settings
    from sparsecraft.checkpoint.integrity import warn_of_changes
    from sparsecraft.checkpoint.save import save
    from sparsecraft.conversion.convert import convert
    from sparsecraft.conversion.domains.router_starts import check_given
    from sparsecraft.dense import hub
    from sparsecraft.dense.loading import load_tokenizer

    starts = domains_of(options)
    # Before the model takes its time.
    check_given(recipe, starts, options.data or None, options.certify)
    folder = hub.resolve(options.model)
    say(_needs(folder, recipe, options, dtype))
    warn_of_changes(folder, "read")
    model = hub.load_dense(
        options.model,
        dtype=dtype,
        device_map=options.device,
        quantize=recipe.quantization,
    )
    check_settings(model)
    tokenizer = load_tokenizer(folder) if options.data or starts else None
    report = convert(
        model,
        recipe,
        options.data or None,
        tokenizer=tokenizer,
        certify=options.certify,
        seed=options.seed,
        sources=options.sources,
        unrelated=options.unrelated,
        domains=starts,
    )
    save(
        model,
        options.out,
        standalone=options.standalone,
        overwrite=options.overwrite,
        shard_size=round(options.shard_size * 1e9),
    )
    _say_report(report, recipe, options, say)


def _needs(folder: Path, recipe: Recipe, options: ConvertOptions, dtype: Any) -> str:
    """What disk and memory the conversion takes, in a sentence; refuses if that is not free."""
    import torch

    from sparsecraft.checkpoint.space import require
    from sparsecraft.conversion.needs import needs
    from sparsecraft.dense.memory import free_memory

    needed = needs(folder, recipe, dtype, data=bool(options.data))
    disk = needed.new + (needed.base if options.standalone else 0)
    free = free_memory(torch.device(options.device))
    return require(
        options.out, disk=disk, memory=needed.memory, task="Conversion", free_memory=free
    )


def domains_of(options: ConvertOptions) -> tuple[Any, ...]:
    """What the routers start from: data sets, or for each expert a list of prompts.

    Raises:
        SparsecraftError: both were given, or a prompt is empty.
    """
    if options.domains and options.prompts:
        raise SparsecraftError(
            "--domains and --prompts both say what the routers start from; leave one out."
        )
    lists = tuple([text.strip() for text in given.split("|")] for given in options.prompts)
    for e, texts in enumerate(lists):
        if not all(texts):
            raise SparsecraftError(
                f"--prompts: prompt {texts.index('')} of expert {e} is empty (both from 0), in "
                f"{options.prompts[e]!r}; prompts are separated by single |."
            )
    return options.domains or lists


def _stream(recipe: Recipe, options: ConvertOptions, dtype: Any, say: Say) -> None:
    """Convert tensor by tensor, from folder to folder."""
    from sparsecraft.conversion.stream import convert_files

    unfit = {
        "--data": options.data,
        "--domains": options.domains,
        "--prompts": options.prompts,
        "--device": options.device != "cpu",
    }
    for name, given in unfit.items():
        if given:
            raise SparsecraftError(
                f"{name} is not for --stream, which has no whole model to run; leave it out."
            )
    report = convert_files(
        options.model,
        recipe,
        options.out,
        sources=options.sources,
        unrelated=options.unrelated,
        dtype=dtype,
        standalone=options.standalone,
        overwrite=options.overwrite,
        resume=options.resume,
        certify=options.certify,
        seed=options.seed,
        shard_size=round(options.shard_size * 1e9),
        progress=options.progress,
        say=say,
    )
    _say_report(report, recipe, options, say)


def _say_report(report: Any, recipe: Recipe, options: ConvertOptions, say: Say) -> None:
    from sparsecraft.evaluation.history import arrived_lines
    from sparsecraft.evaluation.report import cost_lines, left_out_lines

    measured = report.certificate or "not measured"
    say("\n".join([*cost_lines(report.cost), *left_out_lines(report.left_out)]))
    if report.domains:
        say(f"Routers start from {', '.join(report.domains)}.")
    if report.sources:
        say(f"Experts from {', '.join(report.sources)}; other tensors: {recipe.others}.")
        for line in arrived_lines(report.arrived):
            say(line)
        for child in report.children:
            say(f"{child}.")
        say(f"Beside {options.model} alone: {measured}.")
    else:
        claim = "exact at start" if recipe.exact_at_start else "not exact at start"
        say(f"Claim: {claim}. Certificate: {measured}.")
    say(f"Saved and read back: {options.out}")
