"""A merged model on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from sparsecraft.checkpoint.companions import write_dense
from sparsecraft.checkpoint.folder import EXPORT_RECORD
from sparsecraft.checkpoint.integrity import OF_EXPORT, entries, signed
from sparsecraft.checkpoint.jsonfile import write_json
from sparsecraft.checkpoint.replacing import replacing
from sparsecraft.checkpoint.save import save
from sparsecraft.checkpoint.space import require
from sparsecraft.conversion.merging.merge import MergeReport
from sparsecraft.dense import hub
from sparsecraft.errors import CertificateError
from sparsecraft.evaluation.certificate import Certificate
from sparsecraft.evaluation.whole import certify
from sparsecraft.moe import cost
from sparsecraft.surgery.record import is_converted


def write_merged(
    model: nn.Module, out: str | Path, report: MergeReport, source: str | Path, overwrite: bool
) -> Certificate | None:
    """Write a merged model: a plain transformers folder if it is dense, else a checkpoint.

    Args:
        source: the folder whose tokenizer, license and settings travel.

    Returns:
        How a plain folder, read back, compares; `save` rebuilds a checkpoint itself.

    Raises:
        CheckpointError: the folder exists, or the disk refuses.
        CertificateError: the folder, read back by transformers, gives other logits.
    """
    out = Path(out)
    if is_converted(model):
        save(model, out, overwrite=overwrite)
        return None
    size = cost.bytes_of(model)
    require(out, disk=size, memory=size, task="Saving")
    with replacing(out, overwrite) as folder:
        write_dense(model, folder, Path(source))
        again = model.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        certificate = certify(model, again.to(model.device))
        if not certificate.exact:
            raise CertificateError(
                f"The folder, read back, gives other logits: {certificate}. Nothing was kept."
            )
        record = {"target": "dense", **report.to_dict(), "files": entries(folder, OF_EXPORT)}
        record["read_back"] = dataclasses.asdict(certificate)
        write_json(folder / EXPORT_RECORD, signed(record))
        license = hub.license_of(Path(source)) or "other"
        (folder / "README.md").write_text(
            f"---\nlicense: {license}\n---\n# {report.recipe}, merged by sparsecraft\n\n{report}\n"
        )
    return certificate
