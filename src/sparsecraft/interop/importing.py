"""Mixtures that were made elsewhere as converted models of ours: self-contained, trainable, and
exported back to the same bits.

The inverse of `targets`: a dense model is built with the attention of the mixture, the recipe
`imported` puts empty experts into it, and the tensors fill both.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sparsecraft.checkpoint.integrity import warn_of_changes
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.pretrained import writes_ours
from sparsecraft.dense import hub
from sparsecraft.dense.door import NO_CODE, check_config, guarded
from sparsecraft.dense.sound import check_weights
from sparsecraft.errors import CertificateError, CheckpointError
from sparsecraft.evaluation.whole import certify
from sparsecraft.interop.exporting import STANDARD
from sparsecraft.interop.layouts import read_mixturekit, read_pesc
from sparsecraft.interop.targets.form import attention_of, imported
from sparsecraft.interop.targets.standard import Part, Standard, aligned, by_layer
from sparsecraft.interop.twins import random_model, small, with_twin
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipes.camelidae import camelidae
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import plan
from sparsecraft.surgery.record import conversion_of

log = logging.getLogger("sparsecraft")

# model_type -> the architecture.
KINDS = {
    "mixtral": STANDARD["mixtral"],
    "granitemoe": STANDARD["granite"],
    "granitemoeshared": STANDARD["granite"],
    "qwen2_moe": STANDARD["qwen2_moe"],
    "qwen3_moe": STANDARD["qwen3_moe"],
}


def import_moe(source: str | Path, revision: str | None = None) -> nn.Module:
    """A mixture that was made elsewhere as a converted model, in evaluation mode.

    Args:
        source: folder or hub id of a Mixtral, Qwen2-MoE, Qwen3-MoE, GraniteMoe or GraniteMoeShared
            checkpoint (mergekit-moe writes such), of a `traditional` mixture of MixtureKit, or of
            PESC's published models (Camelidae, sparsetral), which have the recipe `camelidae`.
        revision: branch, tag or commit of a hub id.

    Raises:
        HubError: there is no such model, or its weights are incomplete.
        CheckpointError: it is another architecture, or has what ours cannot have.
        CertificateError: the imported model has other logits.
    """
    folder = hub.resolve(source, revision)
    warn_of_changes(folder, "imported")
    path = folder / "config.json"
    data = read_json(path)
    check_config(data, path, CheckpointError)
    with guarded(f"The mixture in {str(source)!r}", CheckpointError):
        model = _read(folder, data, source)
    record = conversion_of(model)
    record.folder = folder.absolute()  # whose tokenizer and license travel
    record.base_card = (str(source), hub.license_of(folder))
    writes_ours(model)
    return model.eval()


def _read(folder: Path, data: dict[str, Any], source: str | Path) -> nn.Module:
    kind = data.get("model_type")
    if "moe_method" in data:
        config, form, held = read_mixturekit(folder, data)
        return _build(config, imported(form, "MixtureKit"), held.dense, held.dtype)
    if {"moe_scaling", "topk"} <= data.keys():
        config, arguments, held = read_pesc(folder, data)
        return _build(config, camelidae(**arguments), held.dense, held.dtype)
    if isinstance(kind, str) and kind in KINDS:
        return _import_standard(folder, kind)
    raise CheckpointError(
        f"{str(source)!r} has model_type {kind!r:.80}; mixtures of {', '.join(KINDS)} are imported."
    )


def _import_standard(folder: Path, kind: str) -> nn.Module:
    target, theirs = KINDS[kind], hub.load_dense(str(folder))
    check_weights(theirs, CheckpointError)
    if not aligned(theirs):
        theirs.set_experts_implementation("eager")
    model = _as_ours(theirs, target)
    model.generation_config = theirs.generation_config
    certificate = certify(theirs, model)
    if certificate.unprobed:
        twin = random_model(small(theirs.config))
        certificate = with_twin(certificate, certify(twin, _as_ours(twin, target)))
    if not certificate.exact:
        raise CertificateError(f"The imported model differs from {str(folder)!r}: {certificate}.")
    conversion_of(model).report["import"] |= {
        "certificate": dataclasses.asdict(certificate),
        "measured": str(certificate),
    }
    return model


def _as_ours(theirs: nn.Module, target: Standard) -> nn.Module:
    """The converted model that has the tensors of a mixture."""
    tensors = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    form = target.read_form(theirs.config, list(by_layer(tensors)[1].values()))
    config = target.dense_config(theirs.config, form)
    tensors = target.from_target(tensors, form, attention_of(config))
    return _build(config, imported(form, target.title), tensors, theirs.dtype)


def _build(config: Any, recipe: Recipe, tensors: Part, dtype: torch.dtype) -> nn.Module:
    """The converted model of a dense configuration, a recipe and all tensors."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **NO_CODE)
    record = apply(model, recipe, plan(model, recipe), on_meta=True)
    found = model.load_state_dict(_own(tensors), strict=False, assign=True)
    model.tie_weights()
    missing = sorted(set(found.missing_keys) - set(model.all_tied_weights_keys))
    if wrong := missing or sorted(found.unexpected_keys):
        word = "lacks" if missing else "holds what ours has no place for:"
        raise CheckpointError(f"The mixture {word} {len(wrong)} tensors: {', '.join(wrong[:3])}.")
    check_weights(model, CheckpointError)
    record.report["import"] = {"tensors": len(tensors), "used": len(tensors)}  # or an error above
    record.digests = {}  # there is no dense model to give back
    return model


def _own(tensors: Part) -> Part:
    """The tensors, each with memory of its own: a part of a larger one is copied."""
    return {
        name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t
        for name, t in tensors.items()
    }
