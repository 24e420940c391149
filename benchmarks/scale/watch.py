"""What a training does while it runs: its clock, its profile, and who waits for the device."""

from __future__ import annotations

import hashlib
import itertools
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

from sparsecraft.dense.digests import digest
from sparsecraft.dense.sharing import own_part
from sparsecraft.moe.names import pattern_of

HOME = ("sparsecraft", "trl", "transformers", "accelerate")
KERNELS, CALLS = 18, 28


class Enough(Exception):
    """All steps were measured; what `train` does at its end is none of the question."""


class Clock(TrainerCallback):
    """Seconds of the steps behind the warm-up, the device waited for at both ends alone, and the
    most memory before and in them.

    Args:
        leave_at: leave `train` behind this step, before it saves the model; None: never.
    """

    def __init__(self, warmup: int, steps: int, leave_at: int | None):
        self.warmup, self.steps, self.leave_at = warmup, steps, leave_at
        self.began, self.seconds, self.at, self.peak_before = 0.0, 0.0, [], 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warmup:
            wait()
            self.peak_before = peak()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        self.at.append(time.perf_counter())
        if state.global_step == self.steps and self.began:
            wait()
            self.seconds = time.perf_counter() - self.began

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.leave_at:
            raise Enough

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step == self.leave_at:
            raise Enough

    def found(self) -> dict[str, float]:
        steps = self.at[self.warmup - 1 :]
        between = [after - before for before, after in itertools.pairwise(steps)]
        return {
            "seconds": self.seconds,
            "median_step": statistics.median(between) if between else 0.0,
            "peak_gib": peak(),
            "peak_before_gib": self.peak_before,
        }


class Prints(TrainerCallback):
    """A digest of all trained weights behind some steps."""

    def __init__(self, steps: tuple[int, ...]):
        self.steps, self.found = steps, {}

    def on_step_end(self, args, state, control, model: nn.Module = None, **kwargs):
        if state.global_step in self.steps:
            trained = [p for p in model.parameters() if p.requires_grad]
            digests = (digest(own_part(p.detach()).cpu()) for p in trained)
            key = f"{len(self.found)}-{state.global_step}"
            self.found[key] = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def peak() -> float:
    """GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


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
