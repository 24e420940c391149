"""`sparsecraft convert`: a recipe's parameters as options, and the conversion from needs to disk.

Torch is imported where it is used, so that help comes at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from sparsecraft.cli.options import ConvertOptions, gathered
from sparsecraft.errors import RecipeError, SparsecraftError, did_you_mean

Say = Callable[[str], None]


def parse(function: Callable, argv: list[str]) -> tuple[dict[str, Any], ConvertOptions]:
    """The arguments of a recipe function, and the options that every recipe has."""
    options = tyro.cli(
        options_of(function, ConvertOptions),
        prog=f"sparsecraft convert {function.__name__}",
        args=gathered(argv),
    )
    values, parameters = dataclasses.asdict(options), inspect.signature(function).parameters
    arguments = {name: values[name] for name in parameters}
    flags = (word.partition("=")[0] for word in argv if word.startswith("--"))
    told = {flag[2:].replace("-", "_") for flag in flags}
    each = options.sources or options.domains or options.prompts
    if each and "num_experts" in parameters.keys() - told and not arguments.get("expand"):
        arguments["num_experts"] = len(each)  # one of each, unless told
    rank = next((name for name in ("rank", "lora_rank") if name in parameters.keys() - told), None)
    if options.sources and rank and not options.match_params:
        from sparsecraft.conversion.sources.lora_experts import largest_rank

        arguments[rank] = largest_rank(options.sources) or arguments[rank]
    return arguments, options


def options_of(function: Callable, *bases: type) -> type:
    """The recipe function's parameters and the options of `bases`, as one dataclass for tyro."""
    from docstring_parser import parse as parse_docstring

    docstring = parse_docstring(function.__doc__)
    texts = {p.arg_name: p.description for p in docstring.params}
    hints = typing.get_type_hints(function)
    fields = [
        (
            name,
            Annotated[hints[name], tyro.conf.arg(help=texts[name])],
            dataclasses.field(default=parameter.default, kw_only=True),
        )
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    options = dataclasses.make_dataclass(f"{function.__name__}_options", fields, bases=bases)
    options.__doc__ = docstring.short_description
    return options


def read_recipe(text: str, by_name: Callable[[str], Callable]) -> Any:
    """The recipe that a text such as `mov` or `molora:num_experts=5,rank=4` names.

    Raises:
        RecipeError: no such recipe or parameter, or no `=`.
    """
    name, _, rest = text.partition(":")
    function = by_name(name)
    known, argv = inspect.signature(function).parameters, []
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise RecipeError(
                f"{text!r} sets {pair!r}; say parameter=value." + did_you_mean(key, known)
            )
        flag = key.replace("_", "-")
        if value.lower() in ("true", "false"):
            argv.append(f"--{flag}" if value.lower() == "true" else f"--no-{flag}")
        else:
            argv += [f"--{flag}", value]
    options = tyro.cli(options_of(function), prog=f"recipe {name}", args=argv)
    return function(**{key: getattr(options, key) for key in known})


def match(
    function: Callable,
    arguments: dict[str, Any],
    options: ConvertOptions,
    by_name: Callable[[str], Callable],
    say: Say,
) -> Any:
    """The recipe of `function` with as many trainable parameters as `--match-params` has."""
    from sparsecraft.conversion.matching import match as match_params
    from sparsecraft.conversion.matching import size_of

    target = read_recipe(options.match_params, by_name)
    parameter = size_of(function)
    size = arguments.pop(parameter)
    if size != inspect.signature(function).parameters[parameter].default:
        raise RecipeError(
            f"--{parameter.replace('_', '-')} {size} and --match-params both set the size of "
            f"{function.__name__!r}; leave one out."
        )
    leaf = {"adapter_dim": "dim", "lora_rank": "rank"}.get(parameter, parameter)
    for text in options.set:
        if text.partition("=")[0].rpartition(".")[2] == leaf:
            raise RecipeError(
                f"--set {text} and --match-params both set the size of {function.__name__!r}; "
                "leave one out."
            )
    found = match_params(function, target, options.model, **arguments)
    say(str(found))
    return found.recipe


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


def run(recipe: Any, options: ConvertOptions, say: Say) -> None:
    """Say what is needed, load, convert, certify, save."""
    import torch

    from sparsecraft.checkpoint.folder import check_free
    from sparsecraft.checkpoint.save import save
    from sparsecraft.checkpoint.space import require
    from sparsecraft.conversion.convert import convert
    from sparsecraft.conversion.domains.router_starts import check_given
    from sparsecraft.conversion.needs import needs as needs_of
    from sparsecraft.dense import hub
    from sparsecraft.dense.loading import load_tokenizer
    from sparsecraft.recipe.overrides import override

    for text in options.set:
        if "=" not in text:
            raise SparsecraftError(f"--set takes field=value; {text!r} has no '='.")
    recipe = override(recipe, dict(text.split("=", 1) for text in options.set))
    check_free(options.out, options.overwrite)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SparsecraftError(
            f"--device {options.device}: torch sees no such device here; use cpu."
        )
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.stream:
        return _stream(recipe, options, dtype, say)
    if options.resume:
        raise SparsecraftError("--resume is for --stream; other conversions write at their end.")
    starts = domains_of(options)
    check_given(recipe, starts, options.data or None)  # before the model takes its time
    folder = hub.resolve(options.model)
    needs = needs_of(folder, recipe, dtype, data=bool(options.data))
    disk = needs.new + (needs.base if options.standalone else 0)
    memory = sum(dataclasses.astuple(needs))
    say(require(options.out, disk=disk, memory=memory, task="Conversion"))
    model = hub.load_dense(
        options.model,
        dtype=dtype,
        device_map=options.device,
        quantize=recipe.quantization,
    )
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


def _stream(recipe: Any, options: ConvertOptions, dtype: Any, say: Say) -> None:
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


def _say_report(report: Any, recipe: Any, options: ConvertOptions, say: Say) -> None:
    from sparsecraft.evaluation.report import cost_lines

    measured = report.certificate or "not measured"
    say("\n".join(cost_lines(report.cost)))
    if report.domains:
        say(f"Routers start from {', '.join(report.domains)}.")
    if report.sources:
        say(f"Experts from {', '.join(report.sources)}; other tensors: {recipe.others}.")
        for child in report.children:
            say(f"{child}.")
        say(f"Beside {options.model} alone: {measured}.")
    else:
        claim = "exact at start" if recipe.exact_at_start else "not exact at start"
        say(f"Claim: {claim}. Certificate: {measured}.")
    say(f"Saved and read back: {options.out}")
