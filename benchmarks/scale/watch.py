"""What a training does while it runs: its clock, its profile, and who waits for the device."""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from sparsecraft.moe.names import pattern_of

HOME = ("sparsecraft", "trl", "transformers", "accelerate")
KERNELS, CALLS = 18, 28


class Enough(Exception):  # noqa: N818: no error, a way out
    """All steps were measured; what `train` does at its end is none of the question."""


class Clock(TrainerCallback):
    """Seconds of every step behind the warm-up, the device waited for at both ends alone.

    Args:
        stops: leave `train` behind the last step, before it saves.
    """

    def __init__(self, warmup: int, steps: int, stops: bool):
        self.warmup, self.steps, self.stops = warmup, steps, stops
        self.began, self.seconds, self.at = 0.0, 0.0, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warmup:
            wait()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        self.at.append(time.perf_counter())
        if state.global_step == self.steps:
            wait()
            self.seconds = time.perf_counter() - self.began

    def on_train_end(self, args, state, control, **kwargs):
        if self.stops:
            raise Enough

    def found(self) -> dict[str, float]:
        between = [b - a for a, b in zip(self.at[self.warmup :], self.at[self.warmup + 1 :])]
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {
            "seconds": self.seconds,
            "steps": self.steps - self.warmup,
            "median_step": statistics.median(between) if between else self.seconds,
            "peak_gib": peak / 2**30,
        }


class Profile(TrainerCallback):
    """A profile of `steps` steps from step `first` on, then of who waits in the step behind."""

    def __init__(self, first: int, steps: int = 2):
        self.first, self.steps = first, steps
        self.text, self.waits = "", Counter()
        self.profile: Any = None
        self.began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            wait()
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = profile(activities=kinds)
            self.profile.__enter__()
            self.began = time.perf_counter()
        if state.global_step == self.first + self.steps:
            self.waiting = who_waits(self.waits)
            self.waiting.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first + self.steps:
            wait()
            seconds = time.perf_counter() - self.began
            self.profile.__exit__(None, None, None)
            self.text = summary(self.profile, seconds, self.steps)
        if state.global_step == self.first + self.steps + 1:
            self.waiting.__exit__(None, None, None)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(profiled: Any, seconds: float, steps: int) -> str:
    """Where a step's time goes: the device's, by kernel and by kind; the host's, by call."""
    events = profiled.key_averages()
    device = lambda e: getattr(e, "self_device_time_total", 0)  # noqa: E731
    on_device = [e for e in events if str(e.device_type).endswith("CUDA")]
    busy = sum(map(device, on_device))
    nccl = sum(device(e) for e in on_device if "nccl" in e.key.lower())
    copies = sum(device(e) for e in on_device if "memcpy" in e.key.lower())
    lines = [
        f"a step: {1e3 * seconds / steps:.1f} ms of the clock; kernels {busy / steps / 1e3:.1f} ms "
        f"in sum, nccl {nccl / steps / 1e3:.1f}, copies {copies / steps / 1e3:.1f}"
    ]
    lines.append("-- kernels: ms a step, times a step")
    for e in sorted(on_device, key=device, reverse=True)[:KERNELS]:
        lines.append(f"{device(e) / steps / 1e3:9.2f} {e.count / steps:8.1f}  {e.key[:110]}")
    on_host = [e for e in events if str(e.device_type).endswith("CPU")]
    lines.append("-- host: own ms a step, whole ms a step, times a step")
    for e in sorted(on_host, key=lambda e: e.self_cpu_time_total, reverse=True)[:CALLS]:
        own, whole = e.self_cpu_time_total / steps / 1e3, e.cpu_time_total / steps / 1e3
        lines.append(f"{own:9.2f} {whole:9.2f} {e.count / steps:8.1f}  {e.key[:90]}")
    return "\n".join(lines)


@contextmanager
def who_waits(counts: Counter) -> Iterator[None]:
    """Count where the host waits for the device, by the last lines of code of ours and theirs."""

    def show(message, category, filename, lineno, file=None, line=None):
        stack = [
            f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno} {f.name}"
            for f in traceback.extract_stack()[:-1]
            if any(f"/{name}/" in f.filename for name in HOME)
        ]
        counts[f"{str(message)[:60]} | " + " < ".join(reversed(stack[-4:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before, warnings.showwarning = warnings.showwarning, show
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before


class Strides(TrainerCallback):
    """Of which parameters a gradient's strides are others than the parameter's, by pattern."""

    def __init__(self):
        self.found: Counter = Counter()

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module = None, **kwargs):
        if state.global_step:
            return
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                strides = f"{tuple(parameter.shape)} {parameter.stride()} {gradient.stride()}"
                self.found[f"{pattern_of(name)} {strides}"] += 1
