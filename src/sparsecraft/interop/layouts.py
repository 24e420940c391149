"""Mixtures that ship their own code: MixtureKit's `traditional` and PESC's (Camelidae, sparsetral).

Both have the configuration of the dense model with fields of their own, and its tensors, with more
below each `mlp`. E experts, D width, H bottleneck width:

    MixtureKit  gate.weight (E, D), experts.E.{gate,up,down}_proj.weight
    PESC        moe_adapter.router.weight (E, D),
                moe_adapter.experts.{E or expert_E}.adapter_down.weight (H, D), adapter_up (D, H)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sparsecraft.dense.origin import Origin
from sparsecraft.errors import CheckpointError
from sparsecraft.interop.targets.form import Form

# Fields of theirs, which no dense configuration has.
OWN = set(
    "architectures auto_map base_model_class moe_method num_experts expert_names expert_model_ids "
    "expert_is_local num_experts_per_tok alpha router_layers router_layers_index stitch_freq "
    "stitch_layers_index mixturekit_trained model_type transformers_version _name_or_path "
    "moe_dtype moe_scaling topk output_router_logits adapter_dim".split()
)

EXPERT = re.compile(r"(.+\.mlp)(?:\.moe_adapter)?\.experts\.(?:expert_)?(\d+)\.(\w+)\.weight")
ROUTER = re.compile(r"(.+\.mlp)\.(?:gate|moe_adapter\.router)\.weight")


@dataclass(frozen=True, slots=True)
class Held:
    """What a folder holds.

    Attributes:
        dense: tensors of the dense model, and routers, under our names.
        experts: path of a network -> (expert, name of its matrix) -> matrix.
    """

    dense: dict[str, Tensor]
    experts: dict[str, dict[tuple[int, str], Tensor]]

    def stacked(self, path: str, name: str) -> Tensor:
        """The matrices of all experts of one network, (E, out, in)."""
        bank = self.experts[path]
        count = 1 + max(e for e, _ in bank)
        if missing := [e for e in range(count) if (e, name) not in bank]:
            raise CheckpointError(f"Expert {missing[0]} at {path} has no {name}.")
        return torch.stack([bank[e, name] for e in range(count)])

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.dense.values())).dtype


def _held(folder: Path) -> Held:
    dense, experts = {}, {}
    for name, tensor in Origin(str(folder), folder).tensors():
        if match := EXPERT.fullmatch(name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        elif match := ROUTER.fullmatch(name):
            dense[f"{match[1]}.router.scorer.weight"] = tensor
        elif ".experts." in name:
            raise CheckpointError(f"{folder} holds {name!r}; experts have no biases here.")
        else:
            dense[name] = tensor
    if not experts:
        raise CheckpointError(f"{folder} holds no experts in safetensors; save it as safetensors.")
    if unrouted := [path for path in experts if f"{path}.router.scorer.weight" not in dense]:
        raise CheckpointError(
            f"{folder} holds no router at {unrouted[0]}: MixtureKit draws routers anew at each "
            "load until they are trained; train and save it there, or join the dense models by "
            "the recipe `btx`."
        )
    return Held(dense, experts)


def _dense_fields(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in OWN}


def read_mixturekit(folder: Path, data: dict[str, Any]) -> tuple[Any, Form, Held]:
    """Dense configuration, mixture, and tensors under our names.

    Args:
        data: its config.json.

    Raises:
        CheckpointError: another method than `traditional`, no routers, or other experts than gated
            ones without biases.
    """
    method, named = data["moe_method"], str(data.get("base_model_class"))
    family = getattr(getattr(transformers, named, None), "config_class", None)
    if method != "traditional" or family is None:
        raise CheckpointError(
            f"{folder} is a {method!r} mixture of {named!r} by MixtureKit; `traditional` ones of a "
            "class of transformers are imported."
        )
    config = family(**_dense_fields(data))
    held = _held(folder)
    for path in held.experts:
        halves = [held.stacked(path, f"{part}_proj") for part in ("gate", "up")]
        held.dense[f"{path}.experts.gate_up"] = torch.cat(halves, dim=1)
        held.dense[f"{path}.experts.down"] = held.stacked(path, "down_proj")
    form = Form(
        num_experts=data["num_experts"],
        top_k=data["num_experts_per_tok"],
        width=config.intermediate_size,
        normalized=True,
    )
    return config, form, held


def read_pesc(folder: Path, data: dict[str, Any]) -> tuple[Any, dict[str, Any], Held]:
    """Dense configuration, arguments of the recipe `camelidae`, and tensors under our names.

    The backbone's LoRA is merged in what was published. The width of the adapters is that of the
    tensors: the released scripts disagree about the configuration's.
    """
    mistral = data.get("model_type") in ("mistral", "sparsetral")
    family = transformers.MistralConfig if mistral else transformers.LlamaConfig
    held = _held(folder)
    for path in held.experts:
        for part in ("down", "up"):
            held.dense[f"{path}.experts.{part}"] = held.stacked(path, f"adapter_{part}")
        for part in ("gate", "up", "down"):
            own = held.dense.pop(f"{path}.{part}_proj.weight")
            held.dense[f"{path}.base.{part}_proj.weight"] = own
    down_EHD = held.dense[f"{path}.experts.down"]
    arguments = {
        "num_experts": len(down_EHD),
        "top_k": data["topk"],
        "adapter_dim": down_EHD.shape[1],
        "adapter_scale": data["moe_scaling"],
        "lora_rank": 0,
    }
    return family(**_dense_fields(data)), arguments, held
