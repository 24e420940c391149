"""A Mixtral that we exported, by transformers alone: on one device, or its experts shared among
several (expert parallelism, transformers 5.23 or newer). Process 0 writes what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from benchmarks.scale.worker import IDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(8, 2048), help="rows, tokens of each"
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    asked = parser.parse_args()
    processes, gpu = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model = loaded(asked.model, getattr(torch, asked.dtype), processes)
    tensor = model.model.layers[0].mlp.experts.down_proj
    held = getattr(tensor, "_local_tensor", tensor)
    with torch.no_grad():
        logits = model(IDS.to(model.device)).logits.float().cpu()
        batch = torch.arange(asked.shape[0] * asked.shape[1], device=model.device) % 300
        speed = tokens_per_second(model, batch.view(*asked.shape), processes)
    found = {
        "processes": processes,
        "experts_held": held.shape[0],
        "tokens_per_second": speed,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(logits, asked.out.with_suffix(".logits"))
        asked.out.write_text(json.dumps(found, indent=1))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def loaded(folder: Path, dtype: torch.dtype, processes: int) -> transformers.PreTrainedModel:
    """Whole, or with 1/processes of the experts of each layer in this process."""
    if processes == 1:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(
        fsdp_size=processes, ep_size=processes, ep_implementation="all_to_all"
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, distributed_config=config
    ).eval()


def tokens_per_second(model: torch.nn.Module, ids: torch.Tensor, processes: int) -> float:
    """Of forward passes, of all processes together, each with rows of its own."""
    count = 3
    for number in range(count + 2):
        if number == 2:
            _wait(processes)
            start = time.perf_counter()
        model(ids, logits_to_keep=1)
    _wait(processes)
    return count * ids.numel() * processes / (time.perf_counter() - start)


def _wait(processes: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if processes > 1:
        dist.barrier()


if __name__ == "__main__":
    main()
