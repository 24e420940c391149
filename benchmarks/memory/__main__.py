"""What train, convert and eval say that they need, against the measured peak, each row in a process
of its own. On a CPU the model is SmolLM2-135M and the peak that of resident memory without a file
behind it, beyond what the loaded model took; on a GPU a Llama of about 1B parameters with random
weights and a vocabulary of 49,152, and the peak torch's own count.

python -m benchmarks.memory run [--device cuda] [--only WORD] [--jobs 1]
python -m benchmarks.memory table
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

from benchmarks.memory.page import write
from benchmarks.scale.subject import SIZES, WORDS, tokenizer

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).parent
RESULTS = HERE / "results.json"
FOUR = {"num_experts": 4}


def rows(device: str) -> list[dict]:
    """What is measured: a verb and its options."""
    small = {"recipe": "camelidae", "arguments": {"num_experts": 4, "adapter_dim": 64}}
    train = [
        {**small, "rows": 1, "length": 512},
        {**small, "rows": 4, "length": 128},
        {**small, "rows": 4, "length": 128, "checkpointing": True},
        {"recipe": "molora", "arguments": {}, "rows": 2, "length": 256},
        {"recipe": "upcycling", "arguments": FOUR, "rows": 1, "length": 256},
        {"recipe": "mov", "arguments": {}, "rows": 4, "length": 128},
    ]
    if device == "cuda":
        train = [row | {"length": 8 * row["length"]} for row in train]
        packed = {**small, "arguments": small["arguments"] | {"quantize": "nf4"}, "quantize": "nf4"}
        train.append({**packed, "rows": 1, "length": 4096})
    convert = [
        {"recipe": "camelidae", "words": []},
        {"recipe": "camelidae", "words": ["--quantize", "nf4"]},
        {"recipe": "mov", "words": []},
        {"recipe": "upcycling", "words": ["--num-experts", "4"]},
        {"recipe": "upcycling", "words": ["--num-experts", "4", "--stream"]},
    ]
    if device == "cuda":
        convert = convert[:-1]  # a stream is for the CPU
    evaluate = [
        {**small, "rows": 4, "length": 512},
        {"recipe": "upcycling", "arguments": FOUR, "rows": 2, "length": 256},
    ]
    verbs = {"train": train, "convert": convert, "eval": evaluate}
    return [{"verb": verb, **row} for verb, listed in verbs.items() for row in listed]


def name_of(row: dict) -> str:
    """A row in words."""
    parts = [row["verb"], row["recipe"], *map(str, row.get("words", ()))]
    parts += [f"{key}={value}" for key, value in row.get("arguments", {}).items()]
    parts += [f"{row['rows']} x {row['length']}"] if "rows" in row else []
    return " ".join([*parts, *(["checkpointing"] if row.get("checkpointing") else [])])


def write_dense(folder: Path) -> str:
    """The model of the GPU rows."""
    shape = SIZES["1b"] | {"vocab_size": 49152}
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path) -> str:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=5000)) for _ in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def measure(row: dict) -> dict | None:
    """What a row says and takes; None where it failed, which is said."""
    path = f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "benchmarks.memory.worker", json.dumps(row)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        print(f"{name_of(row)} FAILED: {done.stderr[-1500:]}", flush=True)
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name_of(row)}: {found}", flush=True)
    return found


def run(asked: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as work:
        given = {"device": asked.device, "data": write_rows(Path(work) / "rows.jsonl")}
        on_gpu = asked.device == "cuda"
        given["model"] = write_dense(Path(work) / "dense") if on_gpu else "smollm2"
        if on_gpu:
            torch.cuda.empty_cache()
        chosen = [row for row in rows(asked.device) if asked.only in name_of(row)]
        with ThreadPoolExecutor(asked.jobs) as pool:
            found = list(pool.map(lambda row: measure(row | given), chosen))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    before = results.get(asked.device, {}).get("rows", {})
    new = {name_of(row): value for row, value in zip(chosen, found, strict=True) if value}
    results[asked.device] = {
        "machine": f"{machine}, {platform.machine()}",
        "commit": asked.commit,
        "versions": versions,
        "rows": before | new,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(HERE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time; one on a GPU")
    parser.add_argument("--commit", default="", help="of this code, for the results")
    asked = parser.parse_args()
    write(HERE) if asked.verb == "table" else run(asked)


if __name__ == "__main__":
    sys.exit(main())
