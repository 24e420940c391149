"""How fast the processes' devices sum a tensor: run under torchrun."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    for megabytes in (1, 25, 1024):
        tensor = torch.ones(megabytes * 2**18, device="cuda")
        for turn in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                dist.all_reduce(tensor)
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / 5
        if rank == 0:
            print(f"all_reduce {megabytes} MiB: {1e3 * seconds:.2f} ms, "
                  f"{megabytes / 1024 / seconds:.1f} GiB/s", flush=True)  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
