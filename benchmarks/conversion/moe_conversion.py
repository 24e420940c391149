"""Dense to mixture, tensor by tensor: time and peak memory beside mergekit-moe, on CPU cores.

    python -m benchmarks.conversion.moe_conversion --mergekit VENV/bin/mergekit-moe

`VENV` is its own environment: pip install 'torch>=2.11,<2.14' mergekit. Every arm is a process
of its own, with one thread, and writes a self-contained folder of the same tensors: the attention
and embeddings of the base, E copies of its feed-forward networks, random routers. The arms run in
turn, in another order in each repeat; what one has written is on the disk before the next starts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.lab.tables import markdown, measure_and_write
from sparsecraft.dense import hub

HERE = Path(__file__).parent
NAME = "benchmarks.conversion.moe_conversion"
EXPERTS = (4, 8)
MERGEKIT, OURS, CERTIFIED, SOURCES = (
    "mergekit-moe",
    "ours, no certificate",
    "ours",
    "ours, E sources, no certificate",
)
ARMS = (MERGEKIT, OURS, CERTIFIED, SOURCES)


def synthetic_llama(folder: Path) -> None:
    """A Llama of 1.24 billion random bfloat16 weights, written a tensor at a time."""
    import torch
    import transformers

    from sparsecraft.checkpoint import shards
    from sparsecraft.checkpoint.tensorfile import Lazy

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> tuple[torch.Tensor]:
        if len(shape) == 1:
            return (torch.ones(shape, dtype=torch.bfloat16),)
        return (torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator),)

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors = {
        name: Lazy(torch.bfloat16, shape, lambda shape=shape: make(shape))
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards.write(folder / "model.safetensors", tensors, 1_000_000_000)
    for path in hub.resolve("smollm2").glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


def command(arm: str, base: Path, experts: int, dtype: str, work: Path, mergekit: str) -> list[str]:
    """The process of one arm; its output is `work / "out"`."""
    out = str(work / "out")
    if arm == MERGEKIT:
        expert = [{"source_model": str(base), "positive_prompts": [""]}]
        config = {"base_model": str(base), "gate_mode": "random", "dtype": dtype}
        path = work / "mergekit.yml"  # JSON is YAML
        path.write_text(json.dumps({**config, "experts": expert * experts}))
        return [mergekit, str(path), out, "--i-understand-this-is-not-useful-without-training"]
    recipe = ["btx", "--set", "others=base"] if arm == SOURCES else ["upcycling"]
    arguments = [sys.executable, "-m", "sparsecraft", "convert", *recipe]
    arguments += ["--model", str(base), "--num-experts", str(experts), "--out", out]
    arguments += ["--stream", "--standalone"] + ([] if arm == CERTIFIED else ["--no-certify"])
    return arguments + (["--sources", *[str(base)] * experts] if arm == SOURCES else [])


def run(arguments: list[str], work: Path) -> dict[str, float]:
    """One process: seconds, seconds until the disk has it all, CPU seconds, peak resident GB."""
    shutil.rmtree(work / "out", ignore_errors=True)
    os.sync()
    load = os.getloadavg()[0]
    # Threads that wait for each other on cores that other jobs use would be all that is measured.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with open(work / "log", "w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    os.sync()
    assert status == 0, (work / "log").read_text()[-2000:]
    return {
        "seconds": seconds,
        "seconds_on_disk": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,  # kilobytes on Linux
        "written_gb": sum(p.stat().st_size for p in (work / "out").iterdir()) / 1e9,
        "load_before": load,
    }


def measure(args: argparse.Namespace) -> dict:
    results = []
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        bases = (
            ("SmolLM2-135M, float32", hub.resolve("smollm2"), "float32"),
            ("Llama 1.24B, bfloat16", work / "base", "bfloat16"),
        )
        # Not here: Linux counts this process's memory as that of the processes it starts.
        own = [sys.executable, "-m", NAME, "--synthetic", work / "base"]
        subprocess.run(own, check=True)
        for name, base, dtype in bases:
            for experts in EXPERTS:
                for repeat in range(args.runs):
                    for arm in ARMS[repeat % len(ARMS) :] + ARMS[: repeat % len(ARMS)]:
                        found = run(command(arm, base, experts, dtype, work, args.mergekit), work)
                        row = {"model": name, "experts": experts, "arm": arm, "repeat": repeat}
                        results.append({**row, **found})
                        print(results[-1], file=sys.stderr, flush=True)
    venv = Path(args.mergekit).parent / "python"
    ask = "from importlib.metadata import version as v; print(v('mergekit'), v('transformers'))"
    theirs = subprocess.run([venv, "-c", ask], capture_output=True, text=True, check=True)
    mergekit, its_transformers = theirs.stdout.split()
    return {
        "command": f"python -m {NAME} --mergekit VENV/bin/mergekit-moe --runs {args.runs}",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, shared with other jobs: "
        "load_before is the one-minute load average",
        "versions": {
            "mergekit": mergekit,
            "transformers of mergekit": its_transformers,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "results": results,
    }


def tables(record: dict) -> str:
    rows = []
    settings = dict.fromkeys((r["model"], r["experts"]) for r in record["results"])
    for model, experts in settings:
        for arm in ARMS:
            runs = sorted(
                (r for r in record["results"] if (r["model"], r["experts"]) == (model, experts)),
                key=lambda r: r["repeat"],
            )
            ours, theirs = ([r for r in runs if r["arm"] == a] for a in (arm, MERGEKIT))
            if not ours:
                continue

            def ratio(key, ours=ours, theirs=theirs):
                pairs = zip(ours, theirs, strict=True)
                return f"{statistics.median(o[key] / t[key] for o, t in pairs):.2f}"

            seconds = [r["seconds"] for r in ours]
            median = statistics.median
            rows.append(
                [
                    f"{model}, {experts} experts",
                    arm,
                    f"{median(seconds):.1f} ({min(seconds):.1f}..{max(seconds):.1f})",
                    ratio("seconds"),
                    f"{median(r['seconds_on_disk'] for r in ours):.1f}",
                    ratio("seconds_on_disk"),
                    f"{median(r['cpu_seconds'] for r in ours):.1f}",
                    f"{max(r['peak_gb'] for r in ours):.2f}",
                    ratio("peak_gb"),
                    f"{ours[0]['written_gb']:.2f}",
                ]
            )
    header = "model|arm|s|ratio|s on disk|ratio|CPU s|peak GB|ratio|written GB".split("|")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    loads = [r["load_before"] for r in record["results"]]
    return (
        f"`{record['command']}`\n\n{record['machine']} ({min(loads):.1f} to {max(loads):.1f}).\n"
        f"{versions}.\n\n" + markdown(header, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="the executable mergekit-moe of its environment")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", help="a folder with 20 GB free; the system's temporary one")
    parser.add_argument("--out", type=Path, default=HERE / "moe_conversion.json")
    parser.add_argument("--table", action="store_true", help="write the page from the JSON alone")
    parser.add_argument("--synthetic", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.synthetic:
        return synthetic_llama(args.synthetic)
    if not (args.table or args.mergekit):
        parser.error("--mergekit is needed to measure")
    measure_and_write(args, measure, tables)


if __name__ == "__main__":
    main()
