"""Load checkpoints in one process, wherever they were trained, and compare their logits with those
of the model that was in memory there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import sparsecraft as sc
from benchmarks.scale.worker import IDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    asked = parser.parse_args()
    found = {}
    for folder in asked.checkpoints:
        wanted = torch.load(folder.with_suffix(".logits"))
        for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
            model = sc.load(folder).to(device)
            with torch.no_grad():
                logits = model.eval()(IDS.to(device)).logits.float().cpu()
            away = (logits - wanted).abs().max() / wanted.abs().max()
            found[f"{folder.name} {device}"] = away.item()
    asked.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
