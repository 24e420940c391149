"""The findings of "Modularity in Transformers" on SmolLM2 and MiniLM, by `analyze_neurons`: each
domain against rows of many others (the paper's way), and against each other.

    python -m benchmarks.neurons data --data DATA --work .neurons    # texts for a bare machine
    python -m benchmarks.neurons run --work .neurons                 # one GPU, or a patient CPU
    python -m benchmarks.neurons table

Domains are word problems, programs, news, science and stories; the reference is many tasks.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
from pathlib import Path

import torch

from benchmarks.lab.clocks import about
from benchmarks.lab.tables import f, insert, markdown
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.evaluation.neurons.neurons import Ranking, analyze_neurons
from sparsecraft.evaluation.neurons.page import drawings, write_page

HERE = Path(__file__).parent
PICTURES = HERE.parent.parent / "docs" / "methods" / "pictures"
INSTRUCT = {"math": "math.train", "code": "code.train", "many tasks": "general.train"}
CHOICE = {"news": "ag_news", "science": "sciq", "stories": "cosmos_qa"}
REFERENCE = "many tasks"
LETTERS = 400_000  # of each domain, some 100,000 tokens
SCORES = ("abs", "freq", "rms")


# ------------------------------------------------------------------ data
def data(args) -> None:
    """Plain texts of each domain, every one once."""
    args.work.mkdir(parents=True, exist_ok=True)
    for domain, name in INSTRUCT.items():
        lines = _lines(args.data / "instruct" / f"{name}.jsonl.gz")
        texts = ("\n\n".join(m["content"] for m in row["messages"]) for row in lines)
        _write(args.work / f"{domain}.jsonl", texts)
    for domain, name in CHOICE.items():
        lines = _lines(args.data / "choice" / f"{name}.jsonl.gz")
        # The longest line is the text; the others are the template's question and answers.
        _write(
            args.work / f"{domain}.jsonl", (max(r["prompt"].split("\n"), key=len) for r in lines)
        )


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def _write(path: Path, texts) -> None:
    kept, letters = [], 0
    for text in dict.fromkeys(texts):
        if letters < LETTERS:
            kept.append(json.dumps({"text": text}) + "\n")
            letters += len(text)
    path.write_text("".join(kept))
    print(f"{path.name}: {len(kept)} texts, {letters:,} letters")


# ------------------------------------------------------------------ run
def run(args) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    domains = [str(args.work / f"{name}.jsonl") for name in (*INSTRUCT, *CHOICE)]
    reference = str(args.work / f"{REFERENCE}.jsonl")
    domains.remove(reference)
    found = about(device) | {"rows": []}
    for name in args.models:
        folder = hub.resolve(name)
        model, tokenizer = hub.load_dense(folder).to(device), load_tokenizer(folder)
        given = {"tokenizer": tokenizer, "limit": args.limit, "max_length": args.length}
        for score, against in (*((s, reference) for s in SCORES), ("abs", None)):
            whole = score == "abs" and against is not None
            metrics = analyze_neurons(
                model, domains, ranking=Ranking(score, against),
                parts=("twin", "pruning") if whole else ("twin",), **given,
            )  # fmt: skip
            found["rows"].append({"name": name} | metrics)
            if whole:
                _pictures(args, name, metrics)
    args.results.write_text(json.dumps(found, indent=1) + "\n")
    table(args)


def _pictures(args, name: str, metrics: dict) -> None:
    drawn = drawings(metrics)
    args.pictures.mkdir(parents=True, exist_ok=True)
    for drawing in drawn:
        (args.pictures / f"neurons_{name}_{drawing.name}.png").write_bytes(drawing.light)
    if args.reports:
        write_page(metrics, drawn, args.reports / name, f"The neurons of {name}")


# ------------------------------------------------------------------ page
def table(args) -> None:
    page, results = args.results.with_name("README.md"), json.loads(args.results.read_text())
    whole = [row for row in _of_paper(results["rows"]) if "pruning" in row]
    parts = [
        f"{results['machine']}, torch {results['torch']}; tokens by domain and model: "
        + "; ".join(f"{row['name']} {row['tokens']}" for row in _of_paper(results["rows"]))
        + ".",
        "### Overlap of two domains' neurons, over chance", overlaps(results["rows"]),
        "### Where they lie, and clusters of weights", places(results["rows"]),
        *(f"### Accuracy left, {row['name']}\n\n{pruned(row)}" for row in whole),
    ]  # fmt: skip
    insert(page, "\n\n".join(parts))
    print(page.read_text())


def _of_paper(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["score"] == "abs" and row["reference"]]


def overlaps(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        for side, measures in _of(row):
            by_share = {
                float(share): value / float(share)
                for share, value in measures["overlap_by_share"].items()
            }
            pairs = _pairs(measures["overlap_by_layer"])
            lines.append(
                [
                    row["name"], row["score"], "many tasks" if row["reference"] else "each other",
                    side, *(f(by_share[share], 2) for share in (0.01, 0.02, 0.05, 0.1)),
                    f(statistics.mean(pairs) / row["share"], 2),
                ]
            )  # fmt: skip
    header = ["model", "score", "against", "weights", "1 %", "2 %", "5 %", "10 %"]
    return markdown([*header, "2 % of each layer"], lines)


def _of(row: dict) -> list[tuple[str, dict]]:
    return [("trained", row["model"]), ("random", row["twin"])]


def _pairs(table: list[list[float]]) -> list[float]:
    return [table[a][b] for a, b in itertools.permutations(range(len(table)), 2)]


def places(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        for side, measures in _of(row):
            by_layer = list(zip(*measures["by_layer"], strict=True))
            clusters = [d for layer in measures["clusters"] for d in layer["domains"]]
            random = [d for layer in measures["clusters"] for d in layer["random"]]
            lines.append(
                [
                    row["name"], row["score"], side, f(statistics.mean(by_layer[0]), 3),
                    f(statistics.mean(by_layer[-1]), 3), f(1 / len(by_layer), 3),
                    *(f(_share_in(found), 3) for found in (clusters, random)),
                ]
            )  # fmt: skip
    header = ["model", "score", "weights", "in the first layer", "in the last", "chance"]
    return markdown([*header, "in clusters beyond chance", "of random clusters"], lines)


def _share_in(found: list) -> float:
    return statistics.mean(item["inside"] for item in found)


def pruned(row: dict) -> str:
    names = [Path(domain).stem for domain in row["domains"]]
    lines = [
        [name, f(part["share"], 3), *(f(value, 2) for value in part["accuracy"]),
         f(statistics.mean(part["accuracy_random"]), 2)]
        for name, part in zip(names, row["pruning"], strict=True)
        if part is not None
    ]  # fmt: skip
    header = ["without the neurons of", "share of all", *names, "as many at random, mean"]
    return markdown(header, lines)


VERBS = {"data": data, "run": run, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path(".neurons"), help="the texts")
    parser.add_argument("--models", nargs="+", default=["smollm2", "minilm"])
    parser.add_argument("--limit", type=int, help="texts of each domain at most")
    parser.add_argument("--length", type=int, help="tokens of a text at most")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    parser.add_argument("--reports", type=Path, help="write the pages here too")
    args = parser.parse_args()
    VERBS[args.verb](args)


if __name__ == "__main__":
    main()
