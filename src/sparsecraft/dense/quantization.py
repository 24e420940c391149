"""How the weights of a dense model are packed: which ways come back as they were, and how they are
said to transformers.

bitsandbytes' `nf4`, `fp4` and `int8` do, from folders that are packed and packed at load: a
checkpoint keeps all settings of theirs. Others, of torchao, GPTQ, AWQ, fp8 and so on, are refused.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from sparsecraft.dense.jsonfile import read_object
from sparsecraft.errors import HubError, SurgeryError

Packing = Literal["nf4", "fp4", "int8"]
PACKINGS = get_args(Packing)
# Of one weight, with the scales of its block.
BYTES: dict[str, float] = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0}
BITSANDBYTES, GGUF = "bitsandbytes", "gguf"  # transformers unpacks the weights of GGUF files


def packing_of(model: Any) -> Packing | None:
    """How a model's weights are packed; None if they are not.

    Raises:
        SurgeryError: in a way that does not come back as it was.
    """
    settings = settings_of(model)
    if settings is not None:
        return _packing(settings, type(model).__name__)
    for name, parameter in model.named_parameters():
        packed = parameter.dtype.itemsize < 2 or type(parameter).__module__.startswith("torchao")
        if packed and not parameter.is_meta:
            raise _refused(type(model).__name__, f"{type(parameter).__name__} at {name}")
    return None


def check_packed(model: Any, folder: Path) -> None:
    """Refuse a folder that says its weights are packed in 4 bits where some are not.

    Raises:
        HubError: bitsandbytes would fail as soon as the model runs.
    """
    for name, module in model.named_modules():
        is_packed = type(module).__name__ == "Linear4bit" and settings_in(folder) is not None
        if is_packed and getattr(module.weight, "quant_state", None) is None:
            raise HubError(
                f"{str(folder)!r} says that its weights are packed (quantization_config), and "
                f"{name!r} is not; take the field out of its config.json."
            )


def keep_layout(model: Any) -> None:
    """Let bitsandbytes leave the 4-bit weights of a model as they are.

    On processors with AVX-512 BF16 it lays them out anew when they are first evaluated, rounds
    their scales to bfloat16, and passes no gradient through them from then on.

    Raises:
        SurgeryError: it has done so already.
    """
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", None) is None:
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", None) is not None:
            raise SurgeryError(
                f"bitsandbytes has laid out {name!r} of this {type(model).__name__} anew for the "
                "processor, which rounds its scales and passes no gradient; convert the model "
                "before it runs for the first time, or load it with sparsecraft.hub.load_dense."
            )
        module.support_avx512bf16_for_cpu = False


def settings_of(model: Any) -> dict[str, Any] | None:
    """What transformers knows of a model's quantization, as JSON data; None if it has none."""
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        found = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if found is None:
        return None
    data = found if isinstance(found, dict) else found.to_dict()
    method = getattr(data.get("quant_method"), "value", data.get("quant_method"))
    return None if method == GGUF else {**data, "quant_method": method}


def settings_in(folder: Path) -> dict[str, Any] | None:
    """The same of a folder, whose weights are packed then; None if they are not."""
    path = folder / "config.json"
    found = read_object(path, HubError).get("quantization_config") or None
    if not isinstance(found, (dict, NoneType)):
        raise HubError(f"{path} has quantization_config={found!r:.80}; it must be an object.")
    return found


def bytes_packed(model: Any, packing: str | None) -> int:
    """Bytes of a model's parameters once its Linears but the output embeddings are packed."""
    from torch import nn

    kept = {id(p): p for p in model.parameters()}
    if packing is None:
        return sum(p.nbytes for p in kept.values())
    head = model.get_output_embeddings()
    linears = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    packed = {id(m.weight): m.weight.numel() for m in linears}
    rest = sum(p.nbytes for key, p in kept.items() if key not in packed)
    return rest + int(sum(packed.values()) * BYTES[packing])


def packing_in(folder: Path, asked: str | None) -> str | None:
    """How the weights of a folder are packed once it is loaded as asked."""
    own = settings_in(folder)
    return asked if own is None else _packing(own, str(folder))


def _packing(settings: dict[str, Any], what: str) -> Packing:
    method = settings.get("quant_method")
    # Older folders of bitsandbytes name no method.
    if method in (BITSANDBYTES, None) and settings.get("load_in_8bit"):
        return "int8"
    if method in (BITSANDBYTES, None) and settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
        if kind in PACKINGS:
            return kind
    raise _refused(what, str(method or settings))


def _refused(what: str, found: str) -> SurgeryError:
    return SurgeryError(
        f"This {what} is quantized by {found:.80}, and a checkpoint could not give it back as it "
        f"is; load it without quantization, or with bitsandbytes ({', '.join(PACKINGS)})."
    )


def loading(folder: Path, asked: str | dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` that pack the weights of a folder as asked.

    Args:
        asked: one of `PACKINGS`, all settings as `settings_of` gives them, or None.

    Raises:
        HubError: an unknown word, bitsandbytes is not there, or the folder is packed otherwise.
    """
    if asked is None:
        return {}
    if isinstance(asked, str) and asked not in PACKINGS:
        known = ", ".join(map(repr, PACKINGS))
        raise HubError(f"quantize={asked!r} is unknown: give {known} or None.")
    if importlib.util.find_spec("bitsandbytes") is None:
        wanted = asked if isinstance(asked, str) else _packing(asked, str(folder))
        raise HubError(
            f"quantize={wanted!r} needs bitsandbytes: run `pip install 'sparsecraft[quant]'`."
        )
    if own := settings_in(folder):
        found = _packing(own, str(folder))
        if isinstance(asked, str) and found != asked:
            raise HubError(f"quantize={asked!r} was asked of {str(folder)!r}, which is {found!r}.")
        return {}  # transformers reads how
    from transformers import BitsAndBytesConfig

    if isinstance(asked, dict):
        given = {k: v for k, v in asked.items() if k[0] != "_" and k != "quant_method"}
        return {"quantization_config": BitsAndBytesConfig(**given)}
    return {"quantization_config": BitsAndBytesConfig(**_usual(asked))}


def _usual(packing: str) -> dict[str, Any]:
    """The settings of a packing of which nothing else is said: QLoRA's (Dettmers et al. 2023)."""
    import torch

    if packing == "int8":
        return {"load_in_8bit": True}
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    kind = {"bnb_4bit_quant_type": packing, "bnb_4bit_use_double_quant": True}
    return {"load_in_4bit": True, "bnb_4bit_compute_dtype": compute, **kind}
