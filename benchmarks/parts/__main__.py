"""Every arm by `sc.train` on equal tokens, and its held-out loss by domain.

    python -m benchmarks.parts data --data ../shared/data --work .parts    # rows for a bare machine
    python -m benchmarks.parts run --work .parts --seconds 1500           # one process for each GPU
    python -m benchmarks.parts speed --work .parts                        # every arm alone
    python -m benchmarks.parts table

A run's steps see at least two million trained tokens. `--tiny` runs a tiny random model on a CPU,
to try the program.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
from pathlib import Path

from benchmarks.lab.queue import read, run_workers
from benchmarks.lab.tables import f, insert, markdown, mean
from benchmarks.parts import run as runs
from benchmarks.parts.arms import ARMS, score
from benchmarks.parts.run import DOMAINS
from sparsecraft.data.chat import has_control
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

HERE = Path(__file__).parent
GENERAL = 1000
NETWORKS = {
    "dense": 1.0,
    "+ relu": None,
    "+ capacity": None,
    "+ capacity, adaptive": None,
}  # for a token, where no count of them is logged


def data(args) -> None:
    """The rows of the three domains, unpacked, without those that hold control tokens, which
    `sc.train` refuses; of the general ones, whose answers are short, the first 1,000."""
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(hub.resolve("smollm2"))
    for domain in DOMAINS:
        for part in ("train", "valid"):
            name = f"{domain}.{part}.jsonl"
            rows = gzip.decompress((args.data / "instruct" / f"{name}.gz").read_bytes())
            kept = [row for row in rows.splitlines() if not has_control(row.decode(), tokenizer)]
            kept = kept[:GENERAL] if domain == "general" else kept
            (args.work / name).write_bytes(b"\n".join(kept) + b"\n")
            print(f"{name}: {len(kept)} rows")


def run(args) -> None:
    run_workers(runs.work, args)


def speed(args) -> None:
    logging.disable(logging.INFO)
    rows = [runs.speed(args, arm) for arm in ARMS]
    args.results.with_name("speed.json").write_text(json.dumps(rows, indent=1) + "\n")


# ------------------------------------------------------------------ page
def table(args) -> None:
    page = args.results.with_name("README.md")
    speeds = json.loads(args.results.with_name("speed.json").read_text())
    insert(page, tables(read(args.results), {row["method"]: row for row in speeds}))
    print(page.read_text())


def tables(rows: list[dict], speeds: dict[str, dict]) -> str:
    """The best rate of every arm, and the mean over its seeds; its speed alone."""
    lines = []
    for arm in ARMS:
        of_arm = [row for row in rows if row["method"] == arm]
        if not of_arm:
            continue
        best = min((r for r in of_arm if r["seed"] == 0), key=score)
        same = [r for r in of_arm if r["lr"] == best["lr"]]
        losses = [f"{mean(r['loss'][d] for r in same):.4f}" for d in DOMAINS]
        spread = max(map(score, same)) - min(map(score, same))
        lines.append(
            [
                arm,
                f"{best['lr']:g}",
                len(same),
                *losses,
                f"{mean(map(score, same)):.4f}",
                f"{spread:.4f}" if len(same) > 1 else None,
                f(best["computing_experts"] or NETWORKS.get(arm, 2.0), 2),
                f"{best['total']:,}",
                f"{best['active']:,}",
                f"{speeds[arm]['tokens_per_second']:,.0f}",
                f"{speeds[arm]['MiB']:,.0f}",
                f(best["load_entropy"], 3),
                f(best["dropped"], 3),
            ]
        )
    header = ["arm", "rate", "seeds", *DOMAINS, "mean", "between seeds", "networks per token"]
    header += ["parameters", "active", "tokens/s", "MiB", "load entropy", "dropped"]
    machine = {(row["machine"], row["torch"]) for row in rows}
    passes = f"{min(r['trained_tokens'] for r in rows):,} trained tokens a run at least"
    return f"{sorted(machine)}, {len(rows)} runs, {passes}.\n\n{markdown(header, lines)}"


VERBS = {"data": data, "run": run, "speed": speed, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path(".parts"), help="the unpacked rows")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--gpus", type=int, nargs="*", help="their numbers; all by default")
    parser.add_argument("--join", action="store_true", help="beside another call on these results")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try it")
    args = parser.parse_args()
    VERBS[args.verb](args)


if __name__ == "__main__":
    main()
