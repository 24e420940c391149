"""The doors: once sparsecraft is imported, transformers' Auto classes and PEFT know our methods.

Importing torch, transformers and PEFT takes seconds, so `import sparsecraft` only leaves a finder
that registers our classes at the moment when transformers' Auto modules or PEFT are imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
)

# Arguments that the Auto classes pass on and that mean nothing for a local checkpoint.
HUB_ARGUMENTS = frozenset(
    "adapter_kwargs cache_dir code_revision commit_hash _commit_hash force_download _from_auto "
    "local_files_only proxies resume_download revision subfolder token trust_remote_code "
    "use_safetensors weights_only _from_pipeline".split()
)


def open_config(module: ModuleType) -> None:
    """Register our configuration with AutoConfig."""
    module.AutoConfig.register("sparsecraft", _config_class(), exist_ok=True)


def open_models(module: ModuleType) -> None:
    """Register a loader with every Auto class of a task that a base can have."""
    for name in AUTO_CLASSES:
        auto_class = getattr(module, name, None)
        if auto_class is not None:
            auto_class.register(_config_class(), _loader_class(name), exist_ok=True)


def open_peft(module: ModuleType) -> None:
    """Register our methods with PEFT; nothing happens while that package itself imports PEFT."""
    importlib.import_module("sparsecraft.interop.peft")


def _config_class() -> type:
    global _CONFIG
    if _CONFIG is None:
        from transformers import PretrainedConfig

        class SparsecraftConfig(PretrainedConfig):
            """The dense model's configuration, wrapped so that nothing else reads our weights."""

            model_type = "sparsecraft"
            base_config: dict | None = None

        _CONFIG = SparsecraftConfig
    return _CONFIG


def _loader_class(auto_class: str) -> type:
    """The class that an Auto class maps our configuration to; it only loads."""

    def from_pretrained(cls, folder, *args, config=None, torch_dtype=None, **kwargs):
        from transformers.models.auto import modeling_auto

        from sparsecraft.checkpoint.load import load
        from sparsecraft.checkpoint.manifest import base_config
        from sparsecraft.errors import CheckpointError

        mapping = getattr(modeling_auto, auto_class)._model_mapping
        architecture = (config.architectures or ["?"])[0]
        family = base_config({"base_config": config.base_config})
        if auto_class != "AutoModel" and (
            type(family) not in mapping or mapping[type(family)].__name__ != architecture
        ):
            raise CheckpointError(
                f"{folder} holds a {architecture}, which {auto_class} does not load; "
                "use the Auto class of its task, or sc.load."
            )
        kwargs = {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS}
        dtype = kwargs.pop("dtype", torch_dtype)
        if config._attn_implementation is not None:  # AutoConfig has taken the argument
            kwargs["attn_implementation"] = config._attn_implementation
        return load(folder, dtype=None if dtype == "auto" else dtype, **kwargs)

    def from_config(cls, config, **kwargs):
        from sparsecraft.errors import CheckpointError

        raise CheckpointError(
            f"{auto_class}.from_config would give a sparsecraft model random weights; build the "
            "dense model from its own configuration and call sc.convert."
        )

    members = {
        "_from_config": classmethod(from_config),
        "config_class": _config_class(),
        "from_pretrained": classmethod(from_pretrained),
        "__doc__": f"Loads a sparsecraft checkpoint for {auto_class}.",
    }
    return type(f"Sparsecraft{auto_class.removeprefix('Auto')}", (), members)


_CONFIG: type | None = None

DOORS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": open_config,
    "transformers.models.auto.modeling_auto": open_models,
    "peft": open_peft,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Calls a door right after its module has been executed for the first time."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in DOORS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Loader(spec.loader, DOORS[fullname])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader, door: Callable[[ModuleType], None]):
        self.inner, self.door = inner, door

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        self.door(module)


def open_doors() -> None:
    """Open each door now if its module is loaded already, else when it is."""
    for name, door in DOORS.items():
        if name in sys.modules:
            door(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
