"""FSDP2 on CPUs: accelerate shares models on accelerators alone, and a trial has none."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def let_fsdp_run() -> None:
    """Let accelerate take a process group of gloo for one of GPUs, if FSDP2 is asked for and there
    is none."""
    if torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    dist.init_process_group("gloo")
