"""The standard MoE architectures that models of ours have exactly, and what each cannot have."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from sparsecraft.errors import CheckpointError
from sparsecraft.interop.targets.form import Attention, Form
from sparsecraft.interop.targets.standard import COMMON, GRANITE_SCALES, Part, Standard

# Hidden width of a shared expert that adds nothing, where an architecture requires one: llama.cpp
# quantizes in blocks of 256 columns at most.
EMPTY = 256

QWEN_NAMES = {
    "mlp.router.scorer.weight": "mlp.gate.weight",
    "mlp.experts.gate_up": "mlp.experts.gate_up_proj",
    "mlp.experts.down": "mlp.experts.down_proj",
}
QWEN2_NAMES = QWEN_NAMES | {
    "mlp.router.base_gate.weight": "mlp.shared_expert_gate.weight",
    "mlp.base.gate_proj.weight": "mlp.shared_expert.gate_proj.weight",
    "mlp.base.up_proj.weight": "mlp.shared_expert.up_proj.weight",
    "mlp.base.down_proj.weight": "mlp.shared_expert.down_proj.weight",
}
GRANITE_NAMES = {
    "mlp.router.scorer.weight": "block_sparse_moe.router.weight",
    "mlp.experts.gate_up": "block_sparse_moe.experts.gate_up_proj",
    "mlp.experts.down": "block_sparse_moe.experts.down_proj",
    "mlp.base.down_proj.weight": "shared_mlp.output_linear.weight",
}


class Mixtral(Standard):
    """Softmax over all, top-k, renormalized, which is our softmax over the k kept; nothing beside
    the experts, no biases, one window for all layers."""

    name, title = "mixtral", "Mixtral"
    model, config_class = "MixtralForCausalLM", "MixtralConfig"
    names = QWEN_NAMES

    def lacks(self, form: Form, attention: Attention) -> str | None:
        return (
            _no_bias(self, attention)
            or _no_norm(self, attention)
            or _no_scales(self, attention)
            or _one_window(self, attention)
            or _nothing_beside(self, form)
            or _always_normalized(self, form)
        )

    def settings(self, form: Form, attention: Attention) -> dict[str, Any]:
        return {
            "intermediate_size": form.width,
            "head_dim": attention.head_dim,
            "sliding_window": attention.windows[0],
            "num_local_experts": form.num_experts,
            "router_jitter_noise": 0.0,
        }

    def read_form(self, config: Any, layers: list[Part]) -> Form:
        return _form(config, config.num_local_experts, config.intermediate_size, True)

    def dense_config(self, config: Any, form: Form) -> Any:
        return transformers.MistralConfig(
            **_common(config, "head_dim"),
            intermediate_size=form.width,
            sliding_window=config.sliding_window,
        )


class Granite(Standard):
    """Top-k, softmax over the k kept; a shared network without a gate; Granite's multipliers, which
    are neutral for other families."""

    name, title = "granite", "GraniteMoeShared"
    model, config_class = "GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig"
    names = GRANITE_NAMES

    def lacks(self, form: Form, attention: Attention) -> str | None:
        if any(attention.windows):
            return f"{self.title} has no sliding window, and the model has one."
        return _no_norm(self, attention) or _no_gate(self, form) or _always_normalized(self, form)

    def biases(self, attention: Attention) -> str:
        return "qkvo" if attention.qkv_bias else ""

    def settings(self, form: Form, attention: Attention) -> dict[str, Any]:
        return {
            "intermediate_size": form.width,
            "shared_intermediate_size": form.shared,
            "attention_bias": attention.qkv_bias,
            "num_local_experts": form.num_experts,
            "attention_multiplier": attention.head_dim**-0.5,
        }

    def read_form(self, config: Any, layers: list[Part]) -> Form:
        shared = getattr(config, "shared_intermediate_size", 0)  # GraniteMoe has none
        return _form(config, config.num_local_experts, config.intermediate_size, True, shared)

    def dense_config(self, config: Any, form: Form) -> Any:
        return transformers.GraniteConfig(
            **_common(config, *GRANITE_SCALES, "head_dim"),
            intermediate_size=form.shared or form.width,
            attention_bias=config.attention_bias,
        )

    def pack(self, part: Part, form: Form) -> Part:
        if form.shared:
            halves = [part.pop(f"mlp.base.{p}_proj.weight") for p in ("gate", "up")]
            part["shared_mlp.input_linear.weight"] = torch.cat(halves)
        return part

    def unpack(self, part: Part, form: Form) -> Part:
        part = dict(part)
        if form.shared:
            gate, up = part.pop("shared_mlp.input_linear.weight").chunk(2)
            part |= {"mlp.base.gate_proj.weight": gate, "mlp.base.up_proj.weight": up}
        return part


class Qwen2Moe(Standard):
    """Softmax over all, top-k, renormalized or not; beside the experts a network times the sigmoid
    of a row, which is always there.

    A network that counts in full has twice its down projection under a row so small that its
    sigmoid is one half; where experts replace the dense network, a small one of zeros stands there.
    """

    name, title = "qwen2_moe", "Qwen2-MoE"
    model, config_class = "Qwen2MoeForCausalLM", "Qwen2MoeConfig"
    names = QWEN2_NAMES

    DOWN, GATE = "mlp.shared_expert.down_proj.weight", "mlp.shared_expert_gate.weight"

    def lacks(self, form: Form, attention: Attention) -> str | None:
        if attention.out_bias:
            return f"the output of attention has a bias, and {self.title} has none there."
        return _no_norm(self, attention) or _no_scales(self, attention)

    def biases(self, attention: Attention) -> str:
        return "qkv"  # zeros where the model has none: the vLLM that was read expects them

    def settings(self, form: Form, attention: Attention) -> dict[str, Any]:
        shared = form.shared or min(EMPTY, form.width)
        kinds = ["sliding_attention" if w else "full_attention" for w in attention.windows]
        return {
            "intermediate_size": shared,
            "moe_intermediate_size": form.width,
            "shared_expert_intermediate_size": shared,
            "num_experts": form.num_experts,
            # With all experts there is nothing to renormalize, and llama.cpp never does.
            "norm_topk_prob": form.normalized and form.top_k < form.num_experts,
            "qkv_bias": True,
            "layer_types": kinds,
            "use_sliding_window": any(attention.windows),
            "sliding_window": next(filter(None, attention.windows), None),
        }

    def read_form(self, config: Any, layers: list[Part]) -> Form:
        _check_alike(config)
        shared = config.shared_expert_intermediate_size
        width, count = config.moe_intermediate_size, config.num_experts
        beside = (
            t for part in layers for n, t in part.items() if n.startswith("mlp.shared_expert.")
        )
        if shared == min(EMPTY, width) and not any(t.any() for t in beside):
            shared = 0
        gated = not all(_is_half(part[self.GATE]) for part in layers)
        normalized = config.norm_topk_prob or config.num_experts_per_tok == count
        return _form(config, count, width, normalized, shared, bool(shared) and gated)

    def dense_config(self, config: Any, form: Form) -> Any:
        if not config.qkv_bias:
            raise CheckpointError(
                "This Qwen2-MoE has qkv_bias=False, and every dense Qwen2 has biases; give it "
                "biases of zero and qkv_bias=True."
            )
        return transformers.Qwen2Config(
            **_common(config, "head_dim", "layer_types"),
            intermediate_size=form.shared or form.width,
            use_sliding_window=config.use_sliding_window,
            sliding_window=config.sliding_window,
        )

    def pack(self, part: Part, form: Form) -> Part:
        if not form.shared:
            like, F = part["mlp.gate.weight"], min(EMPTY, form.width)
            D = like.shape[1]
            for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
                part[f"mlp.shared_expert.{name}_proj.weight"] = like.new_zeros(shape)
        elif not form.gated:
            part[self.DOWN] = 2 * part[self.DOWN]
        if not (form.gated and part[self.GATE].any()):
            part[self.GATE] = _half(part["mlp.gate.weight"][:1])
        return part

    def unpack(self, part: Part, form: Form) -> Part:
        drop = "mlp.shared_" if not form.shared else () if form.gated else self.GATE
        part = {name: t for name, t in part.items() if not name.startswith(drop)}
        if form.shared and not form.gated:
            part[self.DOWN] = part[self.DOWN] / 2
        return part


# A row of these gives logits whose sigmoid is one half to the last bit. Not of zeros: llama.cpp's
# sigmoid is silu(x) / x. The second is the smallest number of float16.
HALVES = (2.0**-100, 2.0**-24)


def _half(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, HALVES[like.dtype == torch.float16])


def _is_half(gate: torch.Tensor) -> bool:
    """Whether a row is one of `_half`, or of zeros, as sparsecraft wrote it before."""
    return any(bool((gate == value).all()) for value in (*HALVES, 0.0))


class Qwen3Moe(Standard):
    """Qwen3's attention; softmax over all, top-k, renormalized or not; nothing beside the experts;
    one window for all layers."""

    name, title = "qwen3_moe", "Qwen3-MoE"
    model, config_class = "Qwen3MoeForCausalLM", "Qwen3MoeConfig"
    names = QWEN_NAMES

    def lacks(self, form: Form, attention: Attention) -> str | None:
        if not attention.qk_norm:
            return f"{self.title} normalizes queries and keys, and {attention.family!r} does not."
        return _one_window(self, attention) or _nothing_beside(self, form)

    def settings(self, form: Form, attention: Attention) -> dict[str, Any]:
        return {
            "intermediate_size": form.width,
            "moe_intermediate_size": form.width,
            "head_dim": attention.head_dim,
            "attention_bias": attention.qkv_bias,
            "num_experts": form.num_experts,
            "norm_topk_prob": form.normalized,
            "use_sliding_window": bool(attention.windows[0]),
            "sliding_window": attention.windows[0],
        }

    def read_form(self, config: Any, layers: list[Part]) -> Form:
        _check_alike(config)
        normalized = config.norm_topk_prob or config.num_experts_per_tok == config.num_experts
        return _form(config, config.num_experts, config.moe_intermediate_size, normalized)

    def dense_config(self, config: Any, form: Form) -> Any:
        kind = "sliding_attention" if config.sliding_window else "full_attention"
        return transformers.Qwen3Config(
            **_common(config, "head_dim"),
            intermediate_size=form.width,
            attention_bias=config.attention_bias,
            layer_types=[kind] * config.num_hidden_layers,
            use_sliding_window=bool(config.sliding_window),
            sliding_window=config.sliding_window,
        )


def _common(config: Any, *more: str) -> dict[str, Any]:
    data = config.to_dict()
    return {key: data[key] for key in (*COMMON, *more) if data.get(key) is not None}


def _form(
    config: Any, count: int, width: int, normalized: bool, shared: int = 0, gated: bool = False
) -> Form:
    return Form(
        num_experts=count,
        top_k=config.num_experts_per_tok,
        width=width,
        normalized=normalized,
        shared=shared,
        gated=gated,
    )


def _check_alike(config: Any) -> None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise CheckpointError(
            f"Not every layer of this {config.model_type} is a mixture (mlp_only_layers="
            f"{config.mlp_only_layers}, decoder_sparse_step={config.decoder_sparse_step}), and its "
            "dense layers have another width; that is not read."
        )


def _no_bias(target: Standard, attention: Attention) -> str | None:
    if not attention.qkv_bias:
        return None
    why = "" if attention.family == "qwen2" else " (attention_bias=True)"
    return f"the attention of this {attention.family} has biases{why}, and {target.title} has none."


def _no_norm(target: Standard, attention: Attention) -> str | None:
    if not attention.qk_norm:
        return None
    return f"{attention.family!r} normalizes queries and keys, and {target.title} does not."


def _no_scales(target: Standard, attention: Attention) -> str | None:
    if not attention.scaled:
        return None
    return f"{attention.family!r} has multipliers, and {target.title} has none."


def _one_window(target: Standard, attention: Attention) -> str | None:
    if len(set(attention.windows)) == 1:
        return None
    return f"its layers have different sliding windows, and {target.title} has one for all."


def _nothing_beside(target: Standard, form: Form) -> str | None:
    if not form.shared:
        return None
    return f"its experts stand beside the dense network, and {target.title} has no shared expert."


def _no_gate(target: Standard, form: Form) -> str | None:
    if not form.gated:
        return None
    return f"a sigmoid gates the network beside its experts, and {target.title} has no such gate."


def _always_normalized(target: Standard, form: Form) -> str | None:
    if form.normalized:
        return None
    return f"its routing weights do not sum to one, and {target.title} always renormalizes them."
