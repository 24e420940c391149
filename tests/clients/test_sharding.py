"""torch's FSDP2: two processes train a sharded model, save it, and it loads as it was."""

from __future__ import annotations

import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import sparsecraft as sc
from sparsecraft.moe.experts.base import Experts
from tests.clients.starting import IDS, RECIPES, converted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="two processes by gloo"),
]


def _train_and_save(rank: int, folder, recipe: str, port: int, banks: bool) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    model = converted(folder, recipe).train()
    if banks:
        for bank in [m for m in model.modules() if isinstance(m, Experts)]:
            fully_shard(bank, mesh=mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        model(IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
    model.save_pretrained(folder / "sharded", is_main_process=rank == 0)
    sc.save(model, folder / "by sc.save", standalone=True)
    if rank == 0:
        torch.save(logits, folder / "logits.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("banks", [False, True], ids=["blocks", "blocks and banks"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes(recipe, banks, tmp_path):
    converted(tmp_path, recipe)  # writes the base
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train_and_save, (tmp_path, recipe, port, banks), nprocs=2)
    wanted = torch.load(tmp_path / "logits.pt")
    for name in ("sharded", "by sc.save"):
        model = sc.load(tmp_path / name)
        assert type(model).__name__ == "LlamaForCausalLM"
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-6)
