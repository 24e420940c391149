"""The one door through which transformers reads a folder that others wrote.

No code that a folder brings is run, no kernel that it names is fetched, and whatever else comes out
of there is one of our errors that names the file.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecraft.dense.jsonfile import (
    MOST_BYTES,
    check_regular,
    kind_of,
    read_bytes,
    read_object,
)
from sparsecraft.errors import HubError, ResourceError, SparsecraftError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

NO_CODE = {"trust_remote_code": False}
# Ways through attention and experts that transformers holds itself.
_OWN_WAYS = frozenset(
    "eager sdpa flex_attention batched_mm grouped_mm paged|eager paged|sdpa".split()
)
MOST_OF_A_COUNT = 1_000_000  # layers, heads, experts, labels: what configurations make lists of
MOST_OF_A_NUMBER = 2**48
_TEXT = (".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken", ".codes")
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
MOST_TOKENS, _LARGE = 10_000_000, re.compile(rb":\s*\d{8,}")
MOST_TEXT = 64 * 2**20  # of a vocabulary; Gemma's tokenizer.json has 33 MB


@contextmanager
def guarded(what: object, error: type[SparsecraftError] = HubError) -> Iterator[None]:
    """Turn whatever a library raises over `what`, a file or a folder, into our error.

    Raises:
        SparsecraftError: of the given kind.
        ResourceError: it does not fit into memory.
    """
    try:
        yield
    except SparsecraftError:
        raise
    except BaseException as fault:
        if not _is_of_the_file(fault):
            raise
        _check_memory(what, fault)
        why = " ".join(str(fault).split())
        if "trust_remote_code" in why:
            why = "it brings code of its own, which is never run"
        if isinstance(fault, ImportError):  # a package that the folder asks for
            raise error(f"{what} cannot be loaded: {why:.300}") from fault
        said = f"{type(fault).__name__}: {why:.300}" if why else type(fault).__name__
        raise error(f"{what} cannot be read ({said}); fetch or save it again.") from fault


def _is_of_the_file(fault: BaseException) -> bool:
    """Whether an exception may come of what a file holds, and is no signal; a panic of a
    tokenizer's Rust is no Exception."""
    return isinstance(fault, Exception) or type(fault).__name__ == "PanicException"


def _check_memory(what: object, fault: BaseException) -> None:
    """Refuse what does not fit, which says nothing against the file."""
    from sparsecraft.dense.memory import is_out_of_memory, what_was_missing

    if is_out_of_memory(fault):
        raise ResourceError(
            f"{what} does not fit into memory: {what_was_missing(fault)}; load it in bfloat16 "
            "(--dtype bfloat16), or where there is more."
        ) from fault


def check_folder(folder: Path, error: type[SparsecraftError] = HubError) -> None:
    """Refuse a folder with a pipe, a device, or a text that is too large to be read.

    Raises:
        SparsecraftError: of the given kind; names it.
    """
    try:
        entries = list(os.scandir(folder)) if folder.is_dir() else []
    except OSError as fault:
        raise error(f"{str(folder)!r} cannot be read ({fault}).") from None
    for entry in entries:
        path = Path(entry.path)
        try:
            found = os.stat(path)
        except OSError:  # a link that leads nowhere is no file to any reader
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise error(f"{path} is {kind_of(found.st_mode)} and no regular file; take it away.")
        if path.suffix in _TEXT and stat.S_ISREG(found.st_mode):
            named = path.name.startswith(("tokenizer.", "vocab")) or path.suffix != ".json"
            check_regular(path, error, MOST_TEXT if named else MOST_BYTES)


def check_ids(folder: Path, error: type[SparsecraftError] = HubError) -> None:
    """Refuse a vocabulary with a number that no token has: its reader, which makes a table up to
    the largest, would end the process.

    Raises:
        SparsecraftError: of the given kind; names the token.
    """
    for path in (folder / name for name in VOCABULARIES):
        if path.is_file() and _LARGE.search(read_bytes(path, error, MOST_TEXT)):
            for token, number in values(read_object(path, error)):
                if isinstance(number, int) and number > MOST_TOKENS and token != "max_length":
                    raise error(
                        f"{path} gives {token!r:.80} the number {number}, and a vocabulary has at "
                        f"most {MOST_TOKENS:,}; fetch or save it again."
                    )


def check_config(
    data: Mapping[str, Any], where: object, error: type[SparsecraftError] = HubError
) -> None:
    """Refuse a configuration that asks for a number that no model has, or for a kernel of the hub.

    Raises:
        SparsecraftError: of the given kind; names the field.
    """
    check_numbers(data, where, error)
    for key, value in _ways(data):
        if value not in _OWN_WAYS:
            raise error(
                f"{where} asks for {key}={value!r:.80}, which may be fetched and run; take the "
                "field out, and pass attn_implementation yourself."
            )


def _ways(data: Any) -> Iterator[tuple[str, str]]:
    """Every name of an implementation in a configuration, or one inside of it, with its field."""
    if not isinstance(data, Mapping):
        return
    for key, value in data.items():
        if str(key).removesuffix("_internal").endswith("_implementation"):
            yield from ((key, word) for _, word in values(value) if isinstance(word, str))
        else:
            yield from _ways(value)


def check_asked(given: Mapping[str, Any], error: type[SparsecraftError] = HubError) -> None:
    """Refuse arguments of `from_pretrained` that let code of the hub run.

    Raises:
        SparsecraftError: of the given kind; says which.
    """
    if given.get("trust_remote_code"):
        raise error(
            "trust_remote_code=True was asked, and code that a model brings is never run here; "
            "leave it out, and take a model that transformers knows."
        )
    for key, value in _ways(given):
        if "/" in value:
            raise error(
                f"{key}={value!r:.80} is a kernel of the hub, whose code is never run here; pass "
                "'sdpa', 'eager' or 'flash_attention_2'."
            )


def read_config(folder: Path, error: type[SparsecraftError] = HubError) -> PreTrainedConfig:
    """The configuration of a folder, as transformers reads it.

    Raises:
        SparsecraftError: of the given kind; it is none, or asks for what no model has.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    check_config(read_object(path, error), path, error)
    with guarded(path, error):
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
        config.to_dict()  # fails on what its class has let pass
        return config


def read_generation(folder: Path, error: type[SparsecraftError]) -> GenerationConfig:
    """The generation settings of a folder, as transformers reads them.

    Raises:
        SparsecraftError: of the given kind; they are none.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    read_object(path, error)
    with guarded(path, error):
        return GenerationConfig.from_pretrained(folder)


def build_config(
    data: Mapping[str, Any], where: object, error: type[SparsecraftError]
) -> PreTrainedConfig:
    """A configuration out of its fields.

    Raises:
        SparsecraftError: of the given kind; there is no such.
    """
    from transformers import AutoConfig

    check_config(data, where, error)
    fields = dict(data)
    with guarded(where, error):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        config.to_dict()
        return config


def build(
    cls: type, config: PreTrainedConfig, where: object, error: type[SparsecraftError], **kwargs: Any
) -> PreTrainedModel:
    """A model of its class and configuration, with random weights.

    Raises:
        SparsecraftError: of the given kind; the configuration is none of this class.
    """
    with guarded(where, error):
        return cls._from_config(config, **kwargs)


def check_numbers(data: Mapping[str, Any], where: object, error: type[SparsecraftError]) -> None:
    """Refuse a configuration, or one inside of it, with a number that no model has.

    Raises:
        SparsecraftError: of the given kind; names the first.
    """
    for key, value in values(data):
        most = MOST_OF_A_COUNT if _is_count(key) else MOST_OF_A_NUMBER
        if isinstance(value, int) and abs(value) > most:
            raise error(f"{where} has {key}={value:.4g}, more than any model; correct it.")


def _is_count(key: str) -> bool:
    words = key.split("_")
    return words[0] in ("num", "n") or words[-1] in ("layers", "heads", "experts", "depths")


def values(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below, by the innermost key."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from values(value, str(name))
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from values(value, key)
    else:
        yield key, data
