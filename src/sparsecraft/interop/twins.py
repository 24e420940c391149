"""Windows that a probe of a model itself does not reach, because that would take too much memory or
time, are probed on a twin: a small model with the same windows, rotary embedding and kinds of
layers, written or read by the same code."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn

from sparsecraft.dense.door import NO_CODE
from sparsecraft.evaluation.certificate import Certificate
from sparsecraft.evaluation.whole import certify
from sparsecraft.interop.targets.form import imported
from sparsecraft.interop.targets.standard import Standard
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import plan

VOCABULARY, WIDTH, EXPERTS = 64, 16, 2
WIDTHS = (
    "intermediate_size moe_intermediate_size shared_intermediate_size "
    "shared_expert_intermediate_size"
).split()


def small(config: Any) -> Any:
    """The configuration of a model of one head of the same width, and one layer of each kind."""
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or [None]))
    fields = {
        "hidden_size": head_dim,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "vocab_size": VOCABULARY,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "dtype": torch.float32,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
        **{name: WIDTH for name in WIDTHS if getattr(config, name, 0)},
    }
    for name, value in fields.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    return small


def random_model(config: Any) -> nn.Module:
    """A model whose outputs show what its attention sees: all of its matrices keep sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, **NO_CODE
        ).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def certify_twin(model: nn.Module, target: Standard) -> Certificate:
    """Export a small twin of a converted model, and compare."""
    form = replace(target.form(model)[0], num_experts=EXPERTS, top_k=1, width=WIDTH)
    form = replace(form, shared=form.shared and WIDTH)
    twin = random_model(small(model.config))
    recipe = imported(form, target.title)
    with torch.random.fork_rng():
        apply(twin, recipe, plan(twin, recipe))
    with TemporaryDirectory() as folder:
        target.write(twin, target.to_target(twin), Path(folder))
        return certify(twin, target.read(twin, Path(folder)))


def with_twin(certificate: Certificate, twin: Certificate) -> Certificate:
    """The certificate of a model, and what its twin's adds."""
    differs = () if twin.exact else (f"a small twin with the same windows differs: {twin}",)
    return replace(
        certificate,
        twin=twin.tokens,
        unprobed=twin.unprobed,
        differs=certificate.differs + differs,
    )
