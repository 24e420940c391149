"""A local folder -> a dense model of transformers, its tokenizer, class and task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from sparsecraft.dense.door import (
    NO_CODE,
    build,
    check_asked,
    check_folder,
    check_ids,
    guarded,
    read_config,
)
from sparsecraft.dense.jsonfile import read_object
from sparsecraft.dense.quantization import check_packed, keep_layout, loading
from sparsecraft.errors import CheckpointError, HubError

Task = Literal["causal", "seq2seq", "encoder", "classification", "image"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model")


def checked(folder: Path) -> Path:
    """The folder, if it holds a model that can be read.

    Raises:
        HubError: it holds none, or something that no reader can open.
    """
    check_folder(folder)
    if (folder / "config.json").is_file():
        return folder
    if not folder.is_dir():
        raise HubError(f"{str(folder)!r} is a file: give the model folder that holds config.json.")
    names = sorted(p.name for p in folder.iterdir()) or ["nothing"]
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise HubError(f"{str(folder)!r} holds no config.json (found: {found}): give a model folder.")


def class_of(model: Any) -> type:
    """The class of a model; FSDP2 gives a sharded one a class of its own on top of that."""
    from torch.distributed.fsdp import FSDPModule

    return type(model).__bases__[1] if isinstance(model, FSDPModule) else type(model)


def _architecture(config: Any) -> tuple[str, str]:
    """(architectures[0], model_type) of a folder, a config.json's dict, a config or a model."""
    if hasattr(config, "named_modules"):  # a model built in memory names none in its config
        return class_of(config).__name__, config.config.model_type
    if isinstance(config, (str, Path)):
        config = read_object(checked(Path(config)) / "config.json", HubError)
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    kind = get("model_type") or "unknown"
    if kind == "sparsecraft":
        raise HubError("This is a sparsecraft checkpoint, not a dense model: use sparsecraft.load.")
    if not get("architectures"):
        advice = 'add the class that wrote it, such as "architectures": ["LlamaForCausalLM"].'
        raise HubError(f"The config (model_type {kind!r}) names no architecture: {advice}")
    names = get("architectures")
    if not (isinstance(names, (list, tuple)) and isinstance(names[0], str)):
        raise HubError(
            f"The config (model_type {kind!r}) has architectures={names!r:.80}; it must be a list "
            "of names."
        )
    return names[0], kind if isinstance(kind, str) else "unknown"


def model_class(config: Any) -> type:
    """The transformers class that `architectures[0]` names, of a folder, dict, config or model.

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


def task_of(model: Any) -> Task:
    """The task of a model, by transformers' own tables.

    `model` is a transformers model (its class decides: one built in memory names no architecture
    in its config), or a folder, a config.json's dict or a config (its first architecture decides).
    Raises HubError when the architecture is absent or none of the five tasks covers it.
    """
    from transformers.models.auto import modeling_auto as auto

    name, kind = _architecture(model)
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


def objective_of(model: Any) -> Task | None:
    """The task of a model whose loss is a cross-entropy: of its tokens, or of the one class that a
    classifier gives each row. None for all others: other heads, regression, several labels a row.
    """
    try:
        task = task_of(model)
    except HubError:  # a head of another kind, for token classification or questions
        return None
    known = task in ("causal", "seq2seq") or (task == "classification" and gives_one_class(model))
    return task if known else None


def gives_one_class(model: Any) -> bool:
    """Whether a classifier gives one of several classes, and no number and not several labels."""
    of_one = model.config.problem_type in (None, "single_label_classification")
    return of_one and model.config.num_labels > 1


def without_objective(model: Any, who: str) -> str:
    """Why `who` cannot take a model for which `objective_of` knows nothing."""
    with suppress(HubError):
        if task_of(model) == "classification":
            return (
                f"This {type(model).__name__} has num_labels={model.config.num_labels} and "
                f"problem_type={model.config.problem_type!r}; {who} takes classifiers that give "
                "each row one of several classes."
            )
    return (
        f"{who} has no objective for {type(model).__name__}; it takes ...ForCausalLM, "
        "...ForConditionalGeneration and ...ForSequenceClassification models."
    )


def load_model(
    folder: Path,
    dtype: Any = None,
    device_map: Any = None,
    quantize: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The dense model of a local folder; see `load_dense`. On "meta" no tensor is read.

    Raises HubError when any weight is missing, misshapen or unreadable; says which weights of the
    folder the model has no place for.
    """
    from sparsecraft.dense.loaded import check_loaded

    check_asked(kwargs)
    cls = model_class(folder)
    read_config(folder)
    kwargs.pop("trust_remote_code", None)
    mapped = kwargs.pop("disable_mmap", None) is False
    kwargs |= loading(folder, quantize)
    # Misshapen weights are reported, like missing ones, and become our one error below.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with guarded(f"The model in {str(folder)!r}"), _filled(folder, kwargs):
        kwargs |= {"dtype": "auto" if dtype is None else dtype, "device_map": device_map}
        model, info = cls.from_pretrained(folder, **kwargs, **NO_CODE)
    check_packed(model, folder)
    if not mapped:
        _unmap(model)
    check_loaded(model, folder, kwargs.get("variant"), info)
    keep_layout(model)
    return model.eval()


def _unmap(model: Any) -> None:
    """Give tensors on the CPU memory of their own: transformers maps the files, and whatever is
    written over them would change the model, or end the process."""
    import torch

    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if tensor.device.type == "cpu" and type(tensor) in (torch.nn.Parameter, torch.Tensor):
            tensor.data = tensor.data.clone()


def skeleton(folder: Path, dtype: Any = None) -> Any:
    """The dense model of a local folder without memory; no tensor is read.

    Args:
        dtype: None takes the folder's own.

    Raises:
        HubError: its configuration is none, or describes a model that its weights cannot fill.
    """
    import torch

    cls, config = model_class(folder), read_config(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with _filled(folder, {}), torch.device("meta"):
        return build(cls, config, f"The model in {str(folder)!r}", HubError, dtype=dtype)


@contextmanager
def _filled(folder: Path, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let no model be built in the block that is larger than the weights that it will get."""
    from sparsecraft.dense.bounds import bounded
    from sparsecraft.dense.weights import Weights

    if kwargs.get("gguf_file") or kwargs.get("state_dict") is not None:
        yield
        return
    try:
        extent = Weights(folder, kwargs.get("variant")).extent
    except CheckpointError as error:
        raise HubError(str(error)) from None
    with bounded(*extent, folder, HubError):
        yield


def load_tokenizer(folder: str | Path) -> Any | None:
    """The tokenizer of `folder` or the image processor of an image model; None if it has none.

    Raises HubError when its files are corrupt or incomplete.
    """
    folder = Path(folder)
    check_folder(folder)
    if any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        from transformers import AutoTokenizer as Auto
    elif (folder / "preprocessor_config.json").is_file():
        from transformers import AutoImageProcessor as Auto
    else:
        return None
    kind = "tokenizer" if Auto.__name__ == "AutoTokenizer" else "image processor"
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            read_object(folder / name, HubError)
    check_ids(folder)
    with guarded(f"The {kind} in {str(folder)!r}"):  # each class reads its files in its own way
        return Auto.from_pretrained(folder, **NO_CODE)
