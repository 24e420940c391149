"""Export to standard forms: reversible weight maps, checked by the logits they give.

A target says which converted models have exactly its mathematics, and refuses the others with the
reason: `form` what of a model it looks at, `standard` what all architectures of transformers share,
`architectures` each of them, `peft` the folder of an adapter, `lint` what engines do otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsecraft.checkpoint.companions import write_companions
from sparsecraft.checkpoint.folder import EXPORT_RECORD, MANIFEST
from sparsecraft.checkpoint.integrity import OF_EXPORT, OF_PEFT_EXPORT, entries, signed
from sparsecraft.checkpoint.jsonfile import write_json
from sparsecraft.checkpoint.replacing import replacing
from sparsecraft.checkpoint.space import require
from sparsecraft.dense.memory import enough_memory
from sparsecraft.dense.sound import check_weights
from sparsecraft.errors import ExportError, did_you_mean
from sparsecraft.evaluation.certificate import Certificate
from sparsecraft.evaluation.whole import certify
from sparsecraft.interop.targets.architectures import Granite, Mixtral, Qwen2Moe, Qwen3Moe
from sparsecraft.interop.targets.form import form_of
from sparsecraft.interop.targets.peft import PeftTarget
from sparsecraft.interop.targets.standard import Standard, write_older_tokenizer
from sparsecraft.interop.twins import certify_twin, with_twin
from sparsecraft.moe import cost
from sparsecraft.surgery.record import check_not_fast, conversion_of

STANDARD: dict[str, Standard] = {t.name: t for t in (Mixtral(), Granite(), Qwen2Moe(), Qwen3Moe())}
TARGETS = STANDARD | {"peft": PeftTarget()}


@dataclass(frozen=True, slots=True)
class Prospect:
    """What an export would be.

    Attributes:
        target: its name.
        reason: why it is not exact; None if it is.
        lint: what engines make of the exported model.
    """

    target: str
    reason: str | None
    lint: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = "exact" if self.reason is None else f"no: {self.reason}"
        return "\n".join([f"{self.target}: {verdict}", *(f"  {warning}" for warning in self.lint)])


def plan(model: nn.Module) -> list[Prospect]:
    """Which targets a converted model has an exact form in, and why not the others; writes nothing.

    Raises:
        SurgeryError: the model is dense.
    """
    prospects = []
    for name, target in TARGETS.items():
        reason = why_not(model, target)
        prospects.append(Prospect(name, reason, () if reason else tuple(target.lint(model))))
    return prospects


def why_not(model: nn.Module, target: Standard | PeftTarget) -> str | None:
    """The reason why the model has no exact form in `target`, with the targets that are exact."""
    reason, form = target.why_not(model), form_of(model)
    if reason is None or target not in STANDARD.values() or isinstance(form, str):
        return reason
    exact = [name for name, other in STANDARD.items() if other.why_not(model) is None]
    return f"{reason} Exact: {', '.join(exact) or 'no standard form; sc.save keeps it'}."


def check_name(target: str) -> None:
    """Raise ExportError unless there is such a target."""
    if target not in TARGETS:
        raise ExportError(f"Unknown target {target!r}." + did_you_mean(target, TARGETS))


@enough_memory("The export", "load the model in bfloat16, or export where there is more")
def export(
    model: nn.Module,
    target: str,
    out: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a converted model in a form that others read: a standard architecture, or PEFT's.

    `sparsecraft.interop.exporting.plan(model)` says before any work which targets are exact.

    Args:
        target: `mixtral`, `granite`, `qwen2_moe` or `qwen3_moe`, which load without sparsecraft, or
            `peft`.
        out: the folder to write; it appears once the exported model has given our logits.

    Returns:
        `difference`: largest |logit difference| of the model read back to ours; `scale`; `dtype` of
        that computation, float32 where memory holds a copy in it; `power`, the smallest error,
        relative to `scale`, that it would have shown; `rounding`, the difference with weights
        rounded to the type of the dense ones, where some are; `probed_tokens`, of the longest
        sequence that this was measured on, which is beyond every sliding window and scaling length
        but those of `windows_not_probed`, that are too large; `measured`, all that in words;
        `parameters`; `tensors`, how many were written; `lint`: of a standard architecture, what
        engines do otherwise; `files` and `digest`: of what was written.

    Raises:
        ExportError: the target's mathematics is not the model's, and why; or the logits differ.
    """
    check_name(target)
    out, chosen = Path(out), TARGETS[target]
    _check(model, target, out)
    tensors = chosen.to_target(model)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    require(out, disk=size, memory=2 * size, task="Exporting")
    with replacing(out, overwrite) as folder:
        chosen.write(model, tensors, folder)
        write_companions(model, folder, tokenizer)
        if target in STANDARD:
            write_older_tokenizer(folder)
        again = chosen.read(model, folder)
        certificate = certify(model, again, tensors)
        if certificate.unprobed and target in STANDARD:
            certificate = with_twin(certificate, certify_twin(model, STANDARD[target]))
        if not certificate.exact:
            raise ExportError(
                f"The exported {target} model differs from ours: {certificate}. Nothing was kept."
            )
        record = _record(model, target, again, certificate) | {"tensors": len(tensors)}
        files = entries(folder, OF_EXPORT if target in STANDARD else OF_PEFT_EXPORT)
        record = signed(record | {"files": files})
        write_json(folder / EXPORT_RECORD, record)
    return record


def _check(model: nn.Module, target: str, out: Path) -> None:
    """Raise ExportError if `out` holds a checkpoint, or the model has no exact form as `target`."""
    if (out / MANIFEST).is_file():
        raise ExportError(
            f"{out} holds a checkpoint, which an export would replace; choose another."
        )
    check_not_fast(model)
    check_weights(model, ExportError)
    if reason := why_not(model, TARGETS[target]):
        raise ExportError(f"This model has no exact form as {target}: {reason}")


def _record(
    model: nn.Module, target: str, again: nn.Module, certificate: Certificate
) -> dict[str, Any]:
    """What export.json says of the model `again` that was read back."""
    return {
        "target": target,
        "recipe": conversion_of(model).recipe.name,
        "difference": certificate.max_difference,
        "scale": certificate.scale,
        "dtype": certificate.dtype,
        "power": certificate.power,
        "rounding": certificate.rounding,
        "probed_tokens": certificate.tokens,
        "twin_tokens": certificate.twin,
        "windows_not_probed": list(certificate.unprobed),
        "measured": str(certificate),
        "parameters": cost.count(again).total,
        **TARGETS[target].record(model),
    }
