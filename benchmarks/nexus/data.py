"""Data files -> packs and domain embeddings, so that a GPU machine needs no encoder.

Shapes: N packs, S = 512 tokens of a pack; M width of the domains' embeddings.

    python -m benchmarks.nexus.data --data ../shared/data --out nexus.npz
"""

from __future__ import annotations

import random

import numpy as np

from benchmarks.lab.corpus import DOMAINS, options, plain, read, save, text_packs
from sparsecraft.conversion.domains.domain import Domain
from sparsecraft.conversion.domains.router_starts import embed_domains
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

TRAIN_PACKS = 2400  # of each domain


def main() -> None:
    args = options("nexus.npz").parse_args()
    tokenizer = load_tokenizer(hub.resolve("smollm2"))
    out: dict[str, np.ndarray] = {}
    domains = []
    for name in DOMAINS:
        train, valid = (
            read(args.data / "instruct" / f"{name}.{part}.jsonl.gz") for part in ("train", "valid")
        )
        random.Random(args.seed).shuffle(train)
        for part, rows, limit in (("train", train, TRAIN_PACKS), ("valid", valid, None)):
            found = text_packs(rows, tokenizer, limit)
            out[f"{name}.{part}/ids"], out[f"{name}.{part}/positions"] = found
        domains.append(Domain.of([plain(row) for row in train[:512]]))
    out["embeddings"] = embed_domains(domains, "minilm").numpy()
    save(args.out, out)
    print("cosines of the domains", (out["embeddings"] @ out["embeddings"].T).round(3).tolist())


if __name__ == "__main__":
    main()
