"""Clocks: milliseconds of calls that take turns, CUDA graphs, kernels, and rates of the card.

A card at its power limit runs faster after an easier side than after a harder one (seen: 6 % on a
dense FFN), so sides take turns in rotated order and the first half of every turn is thrown away.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def about(device: str) -> dict[str, str]:
    """The machine and torch, for a results file."""
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"machine": machine, "torch": torch.__version__}


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------ calls
def steps(layer: nn.Module, pairs: list, backward: bool) -> list[Callable[[], object]]:
    """One call per pair (x, dy): forward without gradients, or forward and backward."""
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def forward(x: Tensor):
        with torch.no_grad():
            return layer(x)

    def both(x: Tensor, dy: Tensor):
        return torch.autograd.grad(layer(x), [x, *parameters], dy)

    if not backward:
        return [lambda x=x: forward(x) for x, _ in pairs]
    return [lambda x=x, dy=dy: both(x, dy) for x, dy in pairs]


def one_pass(
    function: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, backward: bool
) -> Callable[[], object]:
    """`function` of x, forward without gradients, or forward and backward to x and what `layer`
    trains, some of which a routing may leave out."""
    x = x.detach().requires_grad_(backward)
    dy, parameters = torch.randn_like(x), [p for p in layer.parameters() if p.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x)

    def both() -> object:
        return torch.autograd.grad(function(x), [x, *parameters], dy, allow_unused=True)

    return both if backward else forward


def graph(call: Callable) -> Callable[[], object]:
    """The call captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        call()
    return captured.replay


# ------------------------------------------------------------------ times
def rotations(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of every round: each begins one side later."""
    for number in range(rounds):
        shift = number % len(names)
        yield names[shift:] + names[:shift]


def block_size(calls: list[Callable], seconds: float, device: str, passes: int = 1) -> int:
    """How many calls fill so many seconds, from 4 to 400."""
    sync(device)
    start = time.perf_counter()
    for call in calls * passes:
        call()
    sync(device)
    once = (time.perf_counter() - start) / len(calls) / passes
    return max(4, min(400, int(seconds / max(once, 1e-6))))


def block_times(calls: list[Callable], number: int, device: str) -> list[float]:
    """Milliseconds of each of `number` calls in rotation."""
    if device != "cuda":
        out = []
        for i in range(number):
            start = time.perf_counter()
            calls[i % len(calls)]()
            out.append(1e3 * (time.perf_counter() - start))
        return out
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    calls[0]()
    for i, (first, last) in enumerate(events):
        first.record()
        calls[i % len(calls)]()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in events]


def turn(call: Callable, number: int) -> float:
    """Milliseconds of one call: the median of events, after as many calls thrown away."""
    for _ in range(number):
        call()
    return statistics.median(block_times([call], number, "cuda"))


def rounds_of(
    sides: dict[str, Callable],
    rounds: int,
    timed: Callable[[Callable], float],
    seconds: float = float("inf"),
) -> list[dict[str, float]]:
    """Every round's milliseconds by side; three rounds at least, then as many as `rounds` and
    `seconds` allow."""
    rows, begun = [], time.perf_counter()
    for number, order in enumerate(rotations(list(sides), rounds)):
        if number >= 3 and time.perf_counter() - begun > seconds:
            break
        rows.append({name: timed(sides[name]) for name in order})
    return rows


def in_turns(args, calls: dict[str, Callable]) -> list[dict[str, float]]:
    """Every round's milliseconds by side, in turns of `args.turn` seconds on `args.device`: the
    median of a turn's second half."""
    for call in calls.values():
        call()
    blocks = {n: block_size([c], args.turn, args.device, passes=2) for n, c in calls.items()}

    def timed(name: str) -> float:
        times = block_times([calls[name]], blocks[name], args.device)
        return statistics.median(times[len(times) // 2 :])

    return rounds_of({name: name for name in calls}, args.rounds, timed)


def against_dense(rows: list[dict[str, float]]) -> dict[str, dict]:
    """Median and spread of each side over rounds, and of its ratio to `dense` in the same round."""
    found = {}
    for name in rows[0]:
        times = [row[name] for row in rows]
        found[name] = {
            "ms": statistics.median(times),
            "spread": (max(times) - min(times)) / statistics.median(times),
            "speedup": statistics.median(row["dense"] / row[name] for row in rows),
            "rounds": len(rows),
        }
    return found


def peak_beyond(call: Callable, device: str) -> int:
    """Bytes of the GPU that a call takes at most beyond what is there before it."""
    call()
    sync(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    sync(device)
    return torch.cuda.max_memory_allocated() - before


# ------------------------------------------------------------------ kernels and rates
def kernel_table(calls: list[Callable], device: str, number: int = 5) -> dict:
    """Microseconds per call of each CUDA kernel, and between kernels, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    for call in calls * 2:
        call()
    sync(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for i in range(number):
            calls[i % len(calls)]()
        sync(device)
    found = [e for e in record.events() if str(e.device_type).endswith("CUDA")]
    found.sort(key=lambda e: e.time_range.start)
    idle = []  # between kernels; the gap counts for the kernel that comes late
    end = found[0].time_range.end
    for e in found[1:]:
        idle.append((max(0.0, e.time_range.start - end), e.name))
        end = max(end, e.time_range.end)
    rows: dict[str, list[float]] = {}
    for e in found:
        row = rows.setdefault(e.name[:140], [0, 0.0])
        row[0], row[1] = row[0] + 1, row[1] + e.time_range.end - e.time_range.start
    kernels = [{"kernel": k, "calls": n / number, "us": t / number} for k, (n, t) in rows.items()]
    return {
        "idle_us": sum(gap for gap, _ in idle) / number,
        "largest_gaps": [[round(gap, 1), name[:100]] for gap, name in sorted(idle)[-12:]],
        "kernels": sorted(kernels, key=lambda row: -row["us"]),
    }


def copy_rate() -> float:
    """TB/s of a copy on this card, bytes read and written."""
    big = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    return 2**32 / turn(lambda: big[: 2**31].copy_(big[2**31 :]), 8) / 1e9


def ceilings(device: str) -> dict[str, float]:
    """This card's rates on random data: a bf16 product, and a copy."""
    if device != "cuda":
        return {}
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    return {
        "bf16_tflops": 2 * 8192**3 / turn(lambda: a @ b, 50) / 1e9,
        "copy_tb_per_s": copy_rate(),
    }
