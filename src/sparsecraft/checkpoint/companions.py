"""What stands beside a model's tensors and makes it usable: tokenizer, chat template, processor,
generation settings and license."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from sparsecraft.checkpoint.folder import COMPANIONS, GENERATION, PROCESSOR, TOKENIZER
from sparsecraft.checkpoint.jsonfile import write_json
from sparsecraft.checkpoint.manifest import base_config, config_of
from sparsecraft.dense.cache import snapshot_in
from sparsecraft.dense.door import MOST_TEXT, read_generation
from sparsecraft.dense.jsonfile import check_regular
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.errors import CheckpointError, SparsecraftError, first_line
from sparsecraft.surgery.record import settings_of

UNWRITABLE = (OSError, TypeError, ValueError, AttributeError, LookupError)
log = logging.getLogger("sparsecraft")


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Tokenizer, chat template, generation settings and license of a dense or converted model.

    They are copied from where the model came from, its checkpoint or the base's folder; generation
    settings that differ from those there are the model's own, and a tokenizer or processor that is
    given takes the place of all files of the other one.
    """
    source = settings_of(model)
    if source is not None:
        replaced = _files_of(tokenizer)
        copy_companions(source, folder, tuple(p for p in COMPANIONS if p not in replaced))
    _write_generation(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_dense(model: PreTrainedModel, folder: Path, source: Path) -> None:
    """A dense model as transformers writes it, with what stands beside the weights in `source`,
    and generation settings of its own where they differ."""
    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = GenerationConfig()  # its own may be what save_pretrained refuses
    try:
        model.save_pretrained(folder)
    finally:
        if own is not None:
            model.generation_config = own
    (folder / GENERATION).unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)  # transformers writes weights for the owner alone
    copy_companions(source, folder)
    _write_generation(model, folder)


def _write_generation(model: nn.Module, folder: Path) -> None:
    """The model's generation settings, unless they are those that the folder has."""
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation != _generation_config(folder):
        # Not its save_pretrained, which refuses settings that differ from their file in anything
        # and hold sampling flags beside do_sample=false, as published ones do.
        path = folder / GENERATION
        generation.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])


def copy_companions(source: Path, folder: Path, patterns: tuple[str, ...] = COMPANIONS) -> None:
    """Tokenizer, chat template, generation settings and license of `source`, byte for byte, or
    those of them that match one of the patterns."""
    for path in {path for pattern in patterns for path in source.glob(pattern)}:
        for file in [path, *(path.rglob("*") if path.is_dir() else ())]:
            _check_own(file, source)
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def _check_own(path: Path, source: Path) -> None:
    """Refuse to copy what is no file, or a link out of the folder to a file of another name: a
    LICENSE that is another file would travel with the checkpoint.

    Raises:
        CheckpointError: so it is.
    """
    if not path.is_dir():
        check_regular(path, CheckpointError, MOST_TEXT)
    target, root = path.resolve(), source.resolve()
    cached = snapshot_in(root)  # the hub's cache names files by their hash
    inside = root.parents[1] if cached and not cached.subfolder else root
    if target.name != path.name and not target.is_relative_to(inside):
        raise CheckpointError(
            f"{path} is a link to {target}, outside of its folder, and would be copied; put the "
            "file itself there."
        )


def _files_of(tokenizer: Any) -> tuple[str, ...]:
    """The patterns of what a tokenizer, an image processor or a processor of both writes."""
    if tokenizer is None:
        return ()
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return TOKENIZER
    return (*TOKENIZER, *PROCESSOR) if isinstance(tokenizer, ProcessorMixin) else PROCESSOR


def _generation_config(folder: Path) -> GenerationConfig | None:
    """The generation settings in a folder, read as from_pretrained reads them; None if absent."""
    is_there = (folder / GENERATION).is_file()
    return read_generation(folder, CheckpointError) if is_there else None


def check_settings(model: nn.Module, tokenizer: Any = None) -> None:
    """Refuse settings that a save would stumble over, before any work is done: write all that
    stands beside the tensors into a folder that is thrown away, and read it.

    Args:
        model: dense or converted.
        tokenizer: that will be saved with it, if it is not the model's own.

    Raises:
        CheckpointError: which of them cannot be written, or not be read again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, what = Path(scratch), "configuration"
        try:
            config = config_of(model)
            write_json(folder / "config.json", config)
            base_config(config)
            what = "tokenizer, generation settings or license"
            write_companions(model, folder, tokenizer)
            what = "generation settings"
            _generation_config(folder)
            what = "tokenizer"
            if tokenizer is not None:
                load_tokenizer(folder)
        # Each class of transformers refuses in its own way.
        except (SparsecraftError, *UNWRITABLE) as error:
            said = first_line(error)
            raise CheckpointError(
                f"The model's {what} could not be saved with it: {said:.200} Correct that first; "
                "nothing has been done."
            ) from None
    _say_flags(model)


def _say_flags(model: nn.Module) -> None:
    """Say of generation settings that transformers would refuse that they are kept as they are."""
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError as error:
        flags = re.findall(r"- `(\w+)`", str(error)) or [" ".join(str(error).split())[:200]]
        log.warning(
            "The model's generation settings hold %s, which mean nothing beside the others (such "
            "as do_sample=False); they are saved as they are, and transformers' own "
            "save_pretrained may refuse them.", ", ".join(flags),
        )  # fmt: skip
