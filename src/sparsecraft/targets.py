"""Export to standard forms: reversible weight maps, checked by the logits they give.

A target says which converted models have exactly its mathematics, and refuses the others with the
reason. Shapes: E experts, D width, F hidden width; experts.gate_up (E, 2F, D), experts.down
(E, D, F), as in transformers v5.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft import cost
from sparsecraft.certificate import compare, outputs, random_probe
from sparsecraft.checkpoint import new_or_changed
from sparsecraft.errors import ExportError, did_you_mean
from sparsecraft.folder import EXPORT_RECORD, MANIFEST, replacing, write_companions, write_json
from sparsecraft.layer import dense_name, dense_tensors
from sparsecraft.origin import Origin, digest
from sparsecraft.recipe import FFNSpec, Recipe
from sparsecraft.surgery import conversion_of, revert

# Largest relative logit difference between ours and the exported model, read back.
EXPORT_TOLERANCE = 1e-4

# The standard form that a model with split networks has.
MERGE_PARTS = (
    "sc.merge(model) makes it a dense model again, which transformers writes as it is; "
    "sc.set_budget(model, 1.0) first."
)


def export(
    model: nn.Module,
    target: str,
    out: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a converted model in a form that others read: a standard architecture, or PEFT's.

    Args:
        target: `mixtral`, which loads without sparsecraft, or `peft`.
        out: the folder to write; it appears once the exported model has given our logits.

    Returns:
        `difference`: largest |logit difference| of the model read back to ours; `scale`;
        `parameters`.

    Raises:
        ExportError: the target's mathematics is not the model's, and why; or the logits differ.
    """
    if target not in TARGETS:
        raise ExportError(f"Unknown target {target!r}." + did_you_mean(target, TARGETS))
    out, chosen = Path(out), TARGETS[target]
    if (out / MANIFEST).is_file():
        raise ExportError(
            f"{out} holds a checkpoint, which an export would replace; choose another."
        )
    if reason := chosen.why_not(model):
        raise ExportError(f"This model has no exact form as {target}: {reason}")
    tensors = chosen.to_target(model)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    cost.require(out, disk=size, memory=2 * size, task="Exporting")
    probes = [random_probe(model)]
    ours = outputs(model, probes)
    with replacing(out, overwrite) as folder:
        chosen.write(model, tensors, folder)
        write_companions(model, folder, tokenizer)
        again = chosen.read(model, folder)
        certificate = compare(ours, outputs(again, probes))
        if (
            certificate.max_difference
            > EXPORT_TOLERANCE * certificate.scale + certificate.tolerance
        ):
            raise ExportError(
                f"The exported {target} model differs from ours: {certificate}. Nothing was kept."
            )
        record = {
            "target": target,
            "recipe": conversion_of(model).recipe.name,
            "difference": certificate.max_difference,
            "scale": certificate.scale,
            "parameters": cost.count(again).total,
            **chosen.record(model),
        }
        write_json(folder / EXPORT_RECORD, record)
    return record


def _write(model_class: type, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Let transformers write `tensors` in its own format, under the names on its disk."""
    with torch.device("meta"):
        exported = model_class(config)
    exported.load_state_dict(tensors, strict=False, assign=True)
    exported.tie_weights()
    _check_complete(exported, tensors)
    # None makes transformers write its per-expert names, which vLLM and llama.cpp read.
    exported._weight_conversions = None
    exported.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # transformers writes weights for the owner alone


class MixtralTarget:
    """Llama or Mistral with copied experts and renormalized top-k routing, as Mixtral.

    Mixtral's router: softmax over all, top-k, renormalized; the same function as ours, which
    takes the softmax over the k kept.
    """

    BASES = ("llama", "mistral")

    def why_not(self, model: nn.Module) -> str | None:
        """The reason why the model has no exact Mixtral form, with the nearest one that has."""
        recipe = conversion_of(model).recipe
        nearest = "`upcycling` with renormalize=True on a Llama or Mistral model exports exactly."
        if splits(recipe):
            return (
                "its experts are parts of one network that add up, and Mixtral mixes whole "
                f"networks by weights that sum to one. sc.save keeps it as it is; {MERGE_PARTS}"
            )
        for edit in recipe.edits:
            if not isinstance(edit.experts, FFNSpec) or edit.place != "replace":
                return (
                    f"its {edit.experts.kind!r} experts stand {edit.place} a dense module, and "
                    f"Mixtral has nothing but full feed-forward experts. {nearest}"
                )
            if edit.router.select != "top_k" or not edit.router.renormalize:
                return (
                    "its routing weights do not sum to one, and Mixtral always renormalizes them. "
                    + nearest
                )
        config = model.config
        if config.model_type not in self.BASES:
            return f"Mixtral's attention is not that of {config.model_type!r}. {nearest}"
        for name in ("attention_bias", "mlp_bias"):
            if getattr(config, name, False):
                return f"the model has {name}=True, and Mixtral has no biases there."
        layers = len(conversion_of(model).layers)
        if layers != config.num_hidden_layers:
            return (
                f"{layers} of {config.num_hidden_layers} layers are converted, and Mixtral's "
                "are all alike; convert with paths='*'."
            )
        return None

    def write(self, model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
        from transformers import MixtralForCausalLM

        _write(MixtralForCausalLM, self.config(model), tensors, folder)

    def read(self, model: nn.Module, folder: Path) -> nn.Module:
        from transformers import MixtralForCausalLM

        return MixtralForCausalLM.from_pretrained(folder, dtype=_dtype(model)).to(model.device)

    def record(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def config(self, model: nn.Module) -> Any:
        from transformers import MixtralConfig

        edit = conversion_of(model).recipe.edits[0]
        base = model.config.to_dict()
        base["intermediate_size"] //= edit.experts.granularity
        shared = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range "
            "rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings "
            "rope_parameters sliding_window attention_dropout"
        ).split()
        return MixtralConfig(
            **{key: base[key] for key in shared if base.get(key) is not None},
            num_local_experts=edit.experts.num_experts,
            num_experts_per_tok=edit.router.top_k,
            router_jitter_noise=0.0,
            output_router_logits=False,
            dtype=_dtype(model),
        )

    RENAMES = (
        (".mlp.router.scorer.weight", ".mlp.gate.weight"),
        (".mlp.experts.gate_up", ".mlp.experts.gate_up_proj"),
        (".mlp.experts.down", ".mlp.experts.down_proj"),
    )

    def to_target(self, model: nn.Module) -> dict[str, Tensor]:
        """Our tensors under Mixtral's names; the router's temperature folded into its weight."""
        temperature = conversion_of(model).recipe.edits[0].router.temperature
        dtype = _dtype(model)
        tensors = {}
        for name, tensor in model.state_dict().items():
            for ours, theirs in self.RENAMES:
                name = name.removesuffix(ours) + theirs if name.endswith(ours) else name
            if name.endswith(".gate.weight"):
                tensor = tensor / temperature
            # Experts that are still views of one tensor must become real for the writer.
            tensors[name] = tensor.to(dtype).contiguous()
        return tensors

    def from_target(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_target` for a router temperature of 1."""
        renamed = {}
        for name, tensor in tensors.items():
            for ours, theirs in self.RENAMES:
                name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
            renamed[name] = tensor
        return renamed


class PeftTarget:
    """A recipe whose layers stand on a base that stays, as a PEFT adapter on that base.

    PEFT costs seconds to import: what needs it is imported where it is used.
    """

    def why_not(self, model: nn.Module) -> str | None:
        from sparsecraft.peft.configs import why_no_adapter

        if reason := why_no_adapter(conversion_of(model).recipe):
            recipe = conversion_of(model).recipe
            other = MERGE_PARTS if splits(recipe) else "`upcycling` exports as mixtral."
            return f"{reason} sc.save keeps it as it is; {other}"
        if conversion_of(model).report.get("merge", {}).get("folded"):
            return (
                "a merge changed its dense weights, and an adapter would be put on the original "
                "ones; sc.save keeps them all."
            )
        if changed := self._changed(model):
            return (
                f"{len(changed)} dense tensors are not as the base has them, {changed[0]!r} among "
                "them, and an adapter holds new tensors only; sc.save keeps them all."
            )
        return None

    def _changed(self, model: nn.Module) -> list[str]:
        if origin := self._origin(model):
            held = new_or_changed(model, origin)
            return [name for name in held if dense_name(model, name) is not None]
        known, now = conversion_of(model).digests, dense_tensors(model)
        return [name for name, tensor in now.items() if digest(tensor) != known[name][1]]

    def _origin(self, model: nn.Module) -> Origin | None:
        """The base on disk, if the dense model can be built from it alone."""
        record = conversion_of(model)
        origin = Origin.find(record.origin, record.revision)
        dense = dense_tensors(model).items()
        shapes = {name: t.shape for name, t in dense if t.is_floating_point()}
        return origin if origin and origin.holds(model, shapes) else None

    def to_target(self, model: nn.Module) -> dict[str, Tensor]:
        from sparsecraft.peft.folder import adapter_tensors

        return adapter_tensors(model)

    def write(self, model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
        from sparsecraft.peft.folder import write

        write(model, tensors, folder, self._origin(model))

    def read(self, model: nn.Module, folder: Path) -> nn.Module:
        from peft import PeftModel

        return PeftModel.from_pretrained(revert(copy.deepcopy(model)), folder).eval()

    def record(self, model: nn.Module) -> dict[str, Any]:
        origin = self._origin(model)
        base = origin and {
            "name": origin.name,
            "revision": origin.revision,
            "fingerprint": origin.fingerprint(),
            "dtype": str(_dtype(model)).removeprefix("torch."),
        }
        return {"base": base}


TARGETS = {"mixtral": MixtralTarget(), "peft": PeftTarget()}


def splits(recipe: Recipe) -> bool:
    """Whether the recipe deals out the neurons of dense networks."""
    return any(edit.experts.kind == "split" for edit in recipe.edits)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dense tensors' dtype: standard architectures have one for all."""
    return next(t.dtype for t in dense_tensors(model).values() if t.is_floating_point())


def _check_complete(exported: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = set(exported.state_dict())
    if missing := sorted(expected - set(tensors) - set(exported.all_tied_weights_keys)):
        raise ExportError(f"The weight map leaves {len(missing)} tensors empty: {missing[:3]}.")
    if extra := sorted(set(tensors) - expected):
        raise ExportError(f"The weight map has no place for {len(extra)} tensors: {extra[:3]}.")
