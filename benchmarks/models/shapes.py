"""Random dense models and mixtures of the shapes that whole models are timed at, and the converted
models that are timed beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import sparsecraft as sc
from sparsecraft.surgery.budget import split_layers, unmade

SHAPES = {
    "SmolLM2 135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
EXPERTS, SPLIT = 4, 32  # of an upcycled model, two in use; of a split one


def _split() -> sc.Recipe:
    return sc.recipes.gmoefication(num_experts=SPLIT)


# Name -> recipe, whether it gets its form for inference, and the share of experts that run.
SIDES: dict[str, tuple[Callable[[], sc.Recipe], bool, float | None]] = {
    "camel": (sc.recipes.camel, False, None),
    "camel, fast": (sc.recipes.camel, True, None),
    "camelidae": (sc.recipes.camelidae, False, None),
    "camelidae, fast": (sc.recipes.camelidae, True, None),
    "mov": (sc.recipes.mov, False, None),
    "mov, fast": (sc.recipes.mov, True, None),
    "molora": (sc.recipes.molora, False, None),
    "molora, fast": (sc.recipes.molora, True, None),
    "upcycling": (lambda: sc.recipes.upcycling(EXPERTS, 2), False, None),
    "split at half": (_split, False, 0.5),
    "split at a quarter": (_split, False, 0.25),
    "lte at half": (lambda: sc.recipes.lte(SPLIT), False, 0.5),
    "d2dmoe at half": (lambda: sc.recipes.d2dmoe(SPLIT), False, 0.5),
    "cmoe at half": (sc.recipes.cmoe, False, 0.5),
}


def side_of(name: str, shape: dict, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """One of `SIDES`."""
    recipe, fast, share = SIDES[name]
    model = dense_of(shape, dtype, device)
    sc.convert(model, recipe(), certify=False)
    fill(model)
    model.eval().requires_grad_(False)
    if share is not None:
        run_share(model, share)
    if fast:
        print(sc.fast(model), flush=True)
    return model


def run_share(model: nn.Module, share: float) -> None:
    """Run this share of the parts; by thresholds that random tokens give routers of random weights,
    where they rule."""
    routers = [layer.router for layer in split_layers(model).values()]
    if routers[0].spec.k is not None:
        sc.set_budget(model, share)
        return
    record = model.sparsecraft
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (p for router in routers for p in router.parameters()):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    record.running.stages += unmade(record.recipe, record.running)  # else it refuses to calibrate
    ids = torch.randint(5, model.config.vocab_size, (8, 256), device=model.device)
    sc.calibrate(model, [ids], target_flops=share)


def dense_of(shape: dict, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    config = LlamaConfig(**shape, max_position_embeddings=4096)
    return _made(LlamaForCausalLM, config, dtype, device)


def mixtral_of(shape: dict, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """transformers' own mixture of the same networks."""
    sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": None}
    config = MixtralConfig(**shape, **sizes, max_position_embeddings=4096)
    return _made(MixtralForCausalLM, config, dtype, device)


def _made(kind: type, config, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def fill(model: nn.Module) -> None:
    """Give the new matrices that start at zero other values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "experts.up")):
                parameter.normal_(std=0.01)
