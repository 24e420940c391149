"""What a time was measured on."""

from __future__ import annotations

import platform

import torch
from torch import nn


def machine(model: nn.Module) -> str:
    """Device, type of the weights and version of torch, as a sentence."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    else:
        device = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
    return f"{device}, {dtype}, torch {torch.__version__}."
