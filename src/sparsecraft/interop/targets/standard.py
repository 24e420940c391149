"""A standard MoE architecture of transformers as a reversible map of configuration and tensors.

Shapes: E experts, D width, F hidden width; experts.gate_up (E, 2F, D), experts.down (E, D, F), as
in transformers v5.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sparsecraft.checkpoint.jsonfile import read_json, write_json
from sparsecraft.dense.door import NO_CODE
from sparsecraft.errors import ExportError
from sparsecraft.interop.targets.form import Attention, Form, attention_of, form_of
from sparsecraft.interop.targets.lint import lint
from sparsecraft.moe.names import dense_tensors
from sparsecraft.surgery.record import conversion_of

Part = dict[str, Tensor]

# Fields of a configuration that dense models and mixtures share.
COMMON = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id "
    "eos_token_id tie_word_embeddings rope_parameters attention_dropout"
).split()

GRANITE_SCALES = (
    "embedding_multiplier logits_scaling residual_multiplier attention_multiplier"
).split()

LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")


class Standard(ABC):
    """One architecture: what it cannot have, its configuration, and where its tensors are.

    Attributes:
        name: as a target.
        title: in sentences.
        model, config_class: names of its classes in transformers.
        names: our name of a layer's tensor -> its name there, below `model.layers.N.`.
    """

    name: str
    title: str
    model: str
    config_class: str
    names: dict[str, str]

    @abstractmethod
    def lacks(self, form: Form, attention: Attention) -> str | None:
        """What of a model this architecture does not have; None if it is exact."""

    @abstractmethod
    def settings(self, form: Form, attention: Attention) -> dict[str, Any]:
        """The fields of its configuration that are not those of the dense model."""

    @abstractmethod
    def read_form(self, config: Any, layers: list[Part]) -> Form:
        """The mixture that a checkpoint of this architecture holds; the inverse of `settings`.

        Args:
            layers: the tensors of each layer, under their names there.

        Raises:
            CheckpointError: its layers differ from each other.
        """

    @abstractmethod
    def dense_config(self, config: Any, form: Form) -> Any:
        """The configuration of a dense model with the attention of such a checkpoint.

        Raises:
            CheckpointError: no dense model fits it.
        """

    def biases(self, attention: Attention) -> str:
        """The projections that have biases there, of `qkvo`."""
        return _own_biases(attention)

    def pack(self, part: Part, form: Form) -> Part:
        """One layer's tensors, renamed, as the architecture has them."""
        return part

    def unpack(self, part: Part, form: Form) -> Part:
        """The inverse of `pack`."""
        return part

    def why_not(self, model: nn.Module) -> str | None:
        """The reason why the model has no exact form here; None if it has."""
        form = form_of(model)
        return form if isinstance(form, str) else self.lacks(form, attention_of(model.config))

    def form(self, model: nn.Module) -> tuple[Form, Attention]:
        """The model's mixture and attention.

        Raises:
            ExportError: it has no standard form; see `why_not`.
        """
        form, attention = form_of(model), attention_of(model.config)
        if isinstance(form, str):
            raise ExportError(f"This model has no standard form: {form}")
        return form, attention

    def config(self, model: nn.Module) -> Any:
        """The configuration of the exported model."""
        form, attention = self.form(model)
        base = model.config.to_dict()
        fields = {key: base[key] for key in COMMON if base.get(key) is not None}
        if attention.head_dim * base["num_attention_heads"] != base["hidden_size"]:
            fields["head_dim"] = attention.head_dim
        fields |= self.settings(form, attention)
        if attention.scaled:
            fields |= {key: base[key] for key in GRANITE_SCALES}
        fields |= {"num_experts_per_tok": form.top_k, "output_router_logits": False}
        return getattr(transformers, self.config_class)(**fields, dtype=dtype_of(model))

    def lint(self, model: nn.Module) -> list[str]:
        """What engines make of the exported model; see `sparsecraft.interop.targets.lint`."""
        return lint(self.config(model))

    def record(self, model: nn.Module) -> dict[str, Any]:
        return {"lint": self.lint(model)}

    def to_target(self, model: nn.Module) -> Part:
        """Our tensors under this architecture's names; a router's temperature, or what else makes
        its rows, is folded into them."""
        form, attention = self.form(model)
        record = conversion_of(model)
        tensors = {n: t for n, t in model.state_dict().items() if ".mlp.router." not in n}
        for item, layer in zip(record.plan, record.layers, strict=True):
            router, path = layer.router, f"{item.site.path}.router"
            rows_ED = router.scorer.weight_rows().detach()
            if form.temperature != 1:
                rows_ED = rows_ED.float() / form.temperature  # `write` rounds, and says so
            tensors[f"{path}.scorer.weight"] = rows_ED
            if form.gated:
                tensors[f"{path}.base_gate.weight"] = router.base_gate.weight.detach()
        return _layerwise(tensors, lambda part: self._pack(part, form, attention))

    def from_target(self, tensors: Part, form: Form, attention: Attention) -> Part:
        """The inverse of `to_target` for a linear router of temperature 1."""
        return _layerwise(tensors, lambda part: self._unpack(part, form, attention))

    def _pack(self, part: Part, form: Form, attention: Attention) -> Part:
        for p in set(self.biases(attention)) - set(_own_biases(attention)):
            weight = part[f"self_attn.{p}_proj.weight"]
            part[f"self_attn.{p}_proj.bias"] = weight.new_zeros(len(weight))
        return self.pack({self.names.get(n, n): t for n, t in part.items()}, form)

    def _unpack(self, part: Part, form: Form, attention: Attention) -> Part:
        ours = {theirs: name for name, theirs in self.names.items()}
        part = {ours.get(name, name): t for name, t in self.unpack(part, form).items()}
        for p in set(self.biases(attention)) - set(_own_biases(attention)):
            del part[f"self_attn.{p}_proj.bias"]
        return part

    def write(self, model: nn.Module, tensors: Part, folder: Path) -> None:
        """Let transformers write `tensors`, rounded to the type of the dense ones, in its own
        format and under the names on its disk."""
        with torch.device("meta"):
            exported = getattr(transformers, self.model)(self.config(model))
        # The writer takes rows in their order only.
        dtype = dtype_of(model)
        written = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        exported.load_state_dict(written, strict=False, assign=True)
        exported.tie_weights()
        _check_complete(exported, tensors)
        # None makes transformers write its per-expert names, which vLLM and llama.cpp read.
        exported._weight_conversions = None
        exported.save_pretrained(folder)
        _write_older_names(folder / "config.json")
        for path in folder.iterdir():
            path.chmod(0o644)  # transformers writes weights for the owner alone

    def read(self, model: nn.Module, folder: Path) -> nn.Module:
        cls = getattr(transformers, self.model)
        again, found = cls.from_pretrained(
            folder, dtype=dtype_of(model), output_loading_info=True, **NO_CODE
        )
        for kind in ("missing", "unexpected", "mismatched"):
            if names := sorted(map(str, found[f"{kind}_keys"])):
                raise ExportError(
                    f"transformers finds {len(names)} {kind} tensors in what was written, "
                    f"{names[0]} among them. Nothing was kept."
                )
        again = again.to(model.device)
        if not aligned(again):
            again.set_experts_implementation("eager")
        return again


def aligned(model: nn.Module) -> bool:
    """Whether transformers' default for a mixture, a grouped product, can take its matrices: their
    rows have to be multiples of 16 bytes."""
    banks = (t for name, t in model.named_parameters() if ".experts." in name and t.ndim == 3)
    return all(t.shape[-1] * t.element_size() % 16 == 0 for t in banks)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dense tensors' dtype: standard architectures have one for all."""
    return next(t.dtype for t in dense_tensors(model).values() if t.is_floating_point())


def by_layer(tensors: Part) -> tuple[Part, dict[str, Part]]:
    """Tensors outside the layers, and those of each layer below its prefix `model.layers.N.`."""
    outside, layers = {}, {}
    for name, tensor in tensors.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = tensor
        else:
            outside[name] = tensor
    return outside, layers


def _layerwise(tensors: Part, change: Callable[[Part], Part]) -> Part:
    outside, layers = by_layer(tensors)
    for prefix, part in layers.items():
        outside |= {prefix + name: tensor for name, tensor in change(part).items()}
    return outside


def _own_biases(attention: Attention) -> str:
    return "qkv" * attention.qkv_bias + "o" * attention.out_bias


def _check_complete(exported: nn.Module, tensors: Part) -> None:
    expected = set(exported.state_dict())
    if missing := sorted(expected - set(tensors) - set(exported.all_tied_weights_keys)):
        raise ExportError(f"The weight map leaves {len(missing)} tensors empty: {missing[:3]}.")
    if extra := sorted(set(tensors) - expected):
        raise ExportError(f"The weight map has no place for {len(extra)} tensors: {extra[:3]}.")


def _write_older_names(path: Path) -> None:
    """Write the rotary embedding also where transformers 4, and what was written for it, read it:
    without `rope_theta` they would take a default, and give other logits, without a word."""
    config = read_json(path)
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    write_json(path, config)


def write_older_tokenizer(folder: Path) -> None:
    """Call the class of a tokenizer that transformers 5 wrote as transformers 4 knows it too; to
    version 5 both are one."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(path, config)
