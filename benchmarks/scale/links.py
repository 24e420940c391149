"""How fast the processes' devices sum a tensor: run under torchrun."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out, rank = parser.parse_args().out, int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    found = {}
    for megabytes in (1, 25, 1024):
        tensor = torch.ones(megabytes * 2**18, device="cuda")
        for _ in range(2):  # the first turn sets up
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                dist.all_reduce(tensor)
            torch.cuda.synchronize()
        found[f"all_reduce of {megabytes} MiB, ms"] = 200 * (time.perf_counter() - start)
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
