"""`from_pretrained` of a folder of ours, by whichever class of transformers it is called."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from sparsecraft.checkpoint.fields import CONFIG_FIELDS, check_fields
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.load import load
from sparsecraft.checkpoint.manifest import base_config
from sparsecraft.errors import CheckpointError, first_line

DOWNLOADS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def our_folder(name: Any, subfolder: str | None = None) -> Path | None:
    """The local folder of that name, if it is a checkpoint of ours."""
    folder = Path(str(name), subfolder or "")
    if not (folder / "config.json").is_file():
        return None
    data = read_json(folder / "config.json")
    return folder if data.get("model_type") == "sparsecraft" else None


def base_of_adapter(name: Any) -> str | None:
    """The checkpoint of ours that the adapter in a local folder stands on, if it does."""
    folder = Path(str(name))
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return named if isinstance(named, str) and named and our_folder(named) else None


def config_in(folder: Path, name: str | None = None) -> PretrainedConfig:
    """The dense model's configuration out of a checkpoint of ours."""
    data = read_json(folder / "config.json")
    check_fields(data, CONFIG_FIELDS, folder / "config.json")
    config = base_config(data)
    config.name_or_path = str(name or folder)
    return config


def read(name: Any, *, config: PretrainedConfig | None = None, **kwargs: Any) -> Any:
    """The model of a checkpoint of ours, with what `from_pretrained` does besides.

    Args:
        name: a folder, or the hub id of one.
        config: the dense model's, with settings that the model shall have.

    Returns:
        The model, or with `output_loading_info` the model and what was missing: nothing.

    Raises:
        CheckpointError: see `sc.load` and `checkpoint.arguments`.
    """
    folder = _local(name, kwargs)
    reports = kwargs.pop("output_loading_info", False)
    generation = kwargs.pop("generation_config", None)
    adapter = {"adapter_name": kwargs.pop("adapter_name", "default")}
    adapter["adapter_kwargs"] = dict(kwargs.pop("adapter_kwargs", None) or {})
    path = adapter["adapter_kwargs"].pop("_adapter_model_path", None)
    dtype, old_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    if config is not None:
        kwargs = _changes(folder, config) | kwargs
    model = load(folder, dtype=old_dtype if dtype is None else dtype, **kwargs)
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    if path is not None:
        model.load_adapter(str(path), **adapter)
    lacks = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return (model, lacks | {"error_msgs": []}) if reports else model


def _local(name: Any, kwargs: dict[str, Any]) -> Path:
    folder = Path(str(name), kwargs.get("subfolder") or "")
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    given = {key: kwargs[key] for key in DOWNLOADS if kwargs.get(key) is not None}
    try:
        return Path(snapshot_download(str(name), **given), kwargs.get("subfolder") or "")
    except Exception as error:  # as many as the client and its HTTP library have
        raise CheckpointError(
            f"{name!r} is no folder here, and the hub failed: {first_line(error)}"
        ) from None


def _changes(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that differ from those in the folder."""
    known = config_in(folder)
    if type(config) is not type(known):
        raise CheckpointError(
            f"{folder} holds a model with a {type(known).__name__}, and config is a "
            f"{type(config).__name__}."
        )
    free = {"_name_or_path", "transformers_version", "dtype", "architectures"}
    held = known.to_dict()
    new = {k: v for k, v in config.to_dict().items() if k in held and k not in free}
    return {key: value for key, value in new.items() if value != held[key]}
