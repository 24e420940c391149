"""The doors: once sparsecraft is imported, transformers' Auto classes and PEFT know our methods.

Importing torch, transformers and PEFT takes seconds, so `import sparsecraft` only leaves a finder
that registers our classes at the moment when transformers' Auto modules or PEFT are imported.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from sparsecraft.interop import watching


def open_config(module: ModuleType) -> None:
    """Register our configuration with AutoConfig."""
    module.AutoConfig.register("sparsecraft", _config_class(), exist_ok=True)


def open_models(module: ModuleType) -> None:
    """Register a loader with every Auto class of models."""
    for name in dir(module):
        auto_class = getattr(module, name)
        if name.startswith("AutoModel") and getattr(auto_class, "_model_mapping", None) is not None:
            auto_class.register(_config_class(), _loader_class(name), exist_ok=True)


def open_classes(module: ModuleType) -> None:
    """Let the classes of models themselves (`LlamaForCausalLM.from_pretrained`) read a folder of
    ours, and an adapter that stands on one: TRL loads by them."""
    theirs = module.PreTrainedModel.from_pretrained.__func__

    @functools.wraps(theirs)
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        from sparsecraft.interop import reading

        name = pretrained_model_name_or_path
        if (base := reading.base_of_adapter(name)) is not None:
            found = {**(kwargs.get("adapter_kwargs") or {}), "_adapter_model_path": name}
            kwargs["adapter_kwargs"], name = found, base
        if (folder := reading.our_folder(name, kwargs.get("subfolder"))) is None:
            return theirs(cls, name, *args, **kwargs)
        _check_class(folder, cls.__name__, {cls.__name__})
        return reading.read(name, **kwargs)

    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    for name, wrap in (("save_pretrained", watching.signed), ("load_adapter", watching.checked)):
        setattr(module.PreTrainedModel, name, wrap(getattr(module.PreTrainedModel, name)))


def open_configs(module: ModuleType) -> None:
    """Let the classes of configurations read the dense model's out of a folder of ours."""
    theirs = module.PreTrainedConfig.from_pretrained.__func__

    @functools.wraps(theirs)
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        from sparsecraft.interop import reading

        name = pretrained_model_name_or_path
        folder = None if cls.model_type == "sparsecraft" else reading.our_folder(name)
        if folder is None:
            return theirs(cls, name, *args, **kwargs)
        config = reading.config_in(folder, name)
        if type(config) is not cls:
            _wrong_class(folder, type(config).__name__, cls.__name__)
        fields = config.to_dict()
        kept = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        config.update(kept)
        return (config, kwargs) if kwargs.pop("return_unused_kwargs", False) else config

    module.PreTrainedConfig.from_pretrained = classmethod(from_pretrained)


def open_reader(module: ModuleType) -> None:
    """Let tokenizers and processors of a converted model that is not saved yet be its base's."""
    auto_class = getattr(module, READERS[module.__name__])
    theirs = auto_class.from_pretrained

    @functools.wraps(theirs)
    def from_pretrained(pretrained_model_name_or_path, *args, **kwargs):
        from sparsecraft.surgery.identity import base_in

        return theirs(base_in(pretrained_model_name_or_path), *args, **kwargs)

    auto_class.from_pretrained = staticmethod(from_pretrained)


def open_writer(module: ModuleType) -> None:
    """Let what is saved into a folder of ours by its own class be in the folder's record."""
    written = getattr(module, WRITERS[module.__name__])
    written.save_pretrained = watching.recorded(written.save_pretrained)


def open_trainer(module: ModuleType) -> None:
    """Let Trainer go on from folders of ours only as they were written."""
    module.load_sharded_checkpoint = watching.sound(module.load_sharded_checkpoint)


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


def _wrong_class(folder: object, held: str, asked: str) -> None:
    from sparsecraft.errors import CheckpointError

    raise CheckpointError(
        f"{folder} holds a {held}, which {asked} does not load; use the class of its task, or "
        "sc.load."
    )


def _first(names: object) -> str:
    """The class that a configuration names, whatever it holds there."""
    found = names[0] if isinstance(names, (list, tuple)) and names else "?"
    return found if isinstance(found, str) else "?"


def _check_class(folder: object, asked: str, known: set[str], held: str | None = None) -> None:
    """Refuse a class that would build another model than the folder holds."""
    if held is None:
        from sparsecraft.checkpoint.jsonfile import read_json

        held = _first(read_json(folder / "config.json").get("architectures"))
    if held not in known:
        _wrong_class(folder, held, asked)


def _loader_class(auto_class: str) -> type:
    """The class that an Auto class maps our configuration to; it only loads."""

    def from_pretrained(cls, folder, *args, config=None, **kwargs):
        from transformers.models.auto import modeling_auto

        from sparsecraft.checkpoint.manifest import base_config
        from sparsecraft.interop import reading

        mapping = getattr(modeling_auto, auto_class)._model_mapping
        family = type(base_config({"base_config": config.base_config}))
        known = mapping.get(family, ())
        known = known if isinstance(known, tuple) else (known,)
        held = _first(config.architectures)
        _check_class(folder, auto_class, {found.__name__ for found in known}, held)
        if config._attn_implementation is not None:  # AutoConfig has taken the argument
            kwargs["attn_implementation"] = config._attn_implementation
        return reading.read(folder, **kwargs)

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

READERS = {
    "transformers.models.auto.tokenization_auto": "AutoTokenizer",
    "transformers.models.auto.processing_auto": "AutoProcessor",
    "transformers.models.auto.image_processing_auto": "AutoImageProcessor",
    "transformers.models.auto.feature_extraction_auto": "AutoFeatureExtractor",
}
WRITERS = {
    "transformers.tokenization_utils_base": "PreTrainedTokenizerBase",
    "transformers.processing_utils": "ProcessorMixin",
    "transformers.image_processing_base": "ImageProcessingMixin",
    "transformers.feature_extraction_utils": "FeatureExtractionMixin",
    "transformers.video_processing_utils": "BaseVideoProcessor",
    "transformers.generation.configuration_utils": "GenerationConfig",
}
DOORS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.configuration_utils": open_configs,
    "transformers.modeling_utils": open_classes,
    "transformers.models.auto.configuration_auto": open_config,
    "transformers.models.auto.modeling_auto": open_models,
    "transformers.trainer": open_trainer,
    "peft": open_peft,
}
DOORS |= dict.fromkeys(READERS, open_reader) | dict.fromkeys(WRITERS, open_writer)


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
