"""Data files -> arrays for nexus.py, so that a GPU machine needs no tokenizer and no encoder.

Shapes: N packs, S = 512 tokens of a pack; M width of the domains' embeddings.

    python benchmarks/nexus_data.py --data ../shared/data --out nexus.npz
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from split_data import DOMAINS, packs, plain, read

from sparsecraft.conversion.domains.domain import Domain
from sparsecraft.conversion.domains.router_starts import embed_domains
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

TRAIN_PACKS = 2400  # of each domain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("nexus.npz"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = load_tokenizer(hub.resolve("smollm2"))
    out: dict[str, np.ndarray] = {}
    domains = []
    for name in DOMAINS:
        train, valid = (
            read(args.data / "instruct" / f"{name}.{part}.jsonl.gz") for part in ("train", "valid")
        )
        random.Random(args.seed).shuffle(train)
        for part, rows, limit in (("train", train, TRAIN_PACKS), ("valid", valid, None)):
            found = packs(rows, tokenizer, limit)
            out[f"{name}.{part}/ids"], out[f"{name}.{part}/positions"] = found
        domains.append(Domain.of([plain(row) for row in train[:512]]))
    out["embeddings"] = embed_domains(domains, "minilm").numpy()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **out)
    for name, array in out.items():
        print(name, array.shape, array.dtype)
    print(f"{args.out.stat().st_size / 2**20:.1f} MiB")
    print("cosines of the domains", (out["embeddings"] @ out["embeddings"].T).round(3).tolist())


if __name__ == "__main__":
    main()
