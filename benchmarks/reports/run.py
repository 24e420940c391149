"""One recipe: converted, trained by `sc.train`, and analyzed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import sparsecraft as sc
from benchmarks.lab.clocks import about
from benchmarks.parts.run import DOMAINS, dense, tiny_rows
from sparsecraft.evaluation.analysis.figures import drawings
from sparsecraft.evaluation.analysis.page import write_page
from sparsecraft.evaluation.held_out import listed_batches
from sparsecraft.surgery.budget import split_layers

# Steps of each stage, rows of a batch, their length, and rows of each domain that are analyzed.
SIZES = {"steps": 60, "batch": 32, "length": 512, "rows": 80}
TINY = {"steps": 4, "batch": 4, "length": 64, "rows": 12}
DENSE_STEPS, DENSE_RATE = 120, 1e-4
SHARE = 0.5  # of the parts of a split network
NEVER = 10**6  # steps between states
PICTURED = 16  # experts up to which a picture is of each one's share of the domains

RECIPES: dict[str, Callable[[], sc.Recipe]] = {
    "camelidae": sc.recipes.camelidae,
    "molora": sc.recipes.molora,
    "mov": sc.recipes.mov,
    "hydralora": sc.recipes.hydralora,
    "mixlora": sc.recipes.mixlora,
    "smola": sc.recipes.smola,
    "upcycling": sc.recipes.upcycling,
    "drop_upcycling": sc.recipes.drop_upcycling,
    "virtual_groups": sc.recipes.virtual_groups,
    "moepp": lambda: sc.recipes.moepp(hold_steps=20),
    "attentive": sc.recipes.attentive,
    "mpoe": sc.recipes.mpoe,
    "btx": lambda: sc.recipes.btx(3),
    "bam": lambda: sc.recipes.bam(3),
    "nexus": lambda: sc.recipes.nexus(3),
    "upit": lambda: sc.recipes.upit(3),
    "moefication": sc.recipes.moefication,
    "gmoefication": sc.recipes.gmoefication,
    "d2dmoe": lambda: sc.recipes.d2dmoe(64),
    "dsti": lambda: sc.recipes.dsti(64),
    "lte": lambda: sc.recipes.lte(48),
    "cmoe": sc.recipes.cmoe,
}
JOINED = ("btx", "bam", "nexus", "upit")


def shared_out(args, work: Callable[..., dict], items: list[str]) -> list[dict]:
    """`work(args, item)` of every item, in processes that see one GPU each."""
    context = multiprocessing.get_context("spawn")
    gpus = context.Queue()
    for gpu in args.gpus or [None]:
        gpus.put(gpu)
    with context.Pool(max(1, len(args.gpus)), _see, (gpus,)) as pool:
        jobs = [(item, pool.apply_async(work, (args, item))) for item in items]
        found = []
        for item, job in jobs:
            try:
                found.append(job.get())
            except Exception as error:  # the others' results are worth more
                print(f"{item}: {error!r}", flush=True)
    return found


def _see(gpus) -> None:
    gpu = gpus.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)


def files_of(args, part: str) -> list[str]:
    rows = tiny_rows(args.work) if args.tiny else args.work
    return [str(rows / f"{domain}.{part}.jsonl") for domain in DOMAINS]


def train_domain(args, domain: str) -> dict:
    """A dense model that has learned one domain, in a folder."""
    logging.disable(logging.INFO)
    out = args.sources / domain
    if out.exists():
        return {"domain": domain}
    model, tokenizer = dense(args)
    (path,) = (path for path in files_of(args, "train") if f"{domain}." in path)
    batches = listed_batches(
        model, [path], tokenizer, (TINY if args.tiny else SIZES)["length"], None
    )
    steps = TINY["steps"] if args.tiny else DENSE_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=DENSE_RATE)
    order = torch.randperm(len(batches[path]), generator=torch.Generator().manual_seed(0))
    model.train()
    for step in range(steps):
        batch = {**batches[path][order[step % len(order)]]}
        batch.pop("token_mask", None)
        given = {key: value.to(model.device) for key, value in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(**given, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({"domain": domain, "loss": loss.item()}), flush=True)
    return {"domain": domain, "loss": loss.item()}


def one(args, name: str) -> dict:
    """A recipe's row; its picture is written, and its page if asked for."""
    logging.disable(logging.INFO)
    begun, sizes = time.time(), TINY if args.tiny else SIZES
    model, tokenizer = dense(args)
    sources = [str(args.sources / domain) for domain in DOMAINS] if name in JOINED else ()
    by_domain = {"domains": files_of(args, "train")} if name == "nexus" else {}
    recipe = RECIPES[name]()
    sc.convert(model, recipe, certify=False, sources=sources, tokenizer=tokenizer, **by_domain)
    trained = files_of(args, "train")
    with tempfile.TemporaryDirectory() as folder:
        sc.train(
            model, trained, Path(folder) / "out", tokenizer=tokenizer, steps=sizes["steps"],
            batch_size=sizes["batch"], max_length=sizes["length"], progress=False,
            log_every=10, save_every=NEVER,
        )  # fmt: skip
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        _run_share(model, trained, tokenizer)
        options = {"tokenizer": tokenizer, "limit": sizes["rows"]}
        metrics = sc.analyze(model, files_of(args, "valid"), **options)
    drawn = drawings(metrics)
    _picture(args, name, metrics, drawn)
    if args.reports:
        write_page(metrics, drawn, args.reports / name, f"The experts of {name}")
    row = {"recipe": name, "loss": metrics["loss"], "tokens": metrics["tokens"]}
    row |= {"layers": {path: _figures(layer) for path, layer in metrics["layers"].items()}}
    row |= {"dropped": _most_lost(metrics), "seconds": time.time() - begun} | about(device)
    print(json.dumps({key: value for key, value in row.items() if key != "layers"}), flush=True)
    return row


def _run_share(model: nn.Module, files: list[str], tokenizer) -> None:
    """Let split networks run half of their parts."""
    layers = split_layers(model)
    if not layers:
        return
    if next(iter(layers.values())).router.spec.k is not None:
        sc.set_budget(model, SHARE)
    else:
        sc.calibrate(model, files, target_flops=SHARE, tokenizer=tokenizer)


def _picture(args, name: str, metrics: dict, drawn: list) -> None:
    most = max(layer["experts"] for layer in metrics["layers"].values())
    figures = {drawing.name: drawing for drawing in drawn}
    wanted = ["choices", "knowledge"] if most <= PICTURED else ["knowledge", "load"]
    picture = next((figures[figure] for figure in [*wanted, "load"] if figure in figures), None)
    if picture is not None:
        args.pictures.mkdir(parents=True, exist_ok=True)
        (args.pictures / f"{name}.png").write_bytes(picture.light)


def _figures(layer: dict) -> dict:
    known, entropy = layer.get("domain_information") or {}, layer.get("entropy") or {}
    return {
        "experts": layer["experts"],
        "load_entropy": layer["load_entropy"],
        "dead": len(layer["dead"]),
        "H_s": entropy.get("H_s"),
        "H_u": entropy.get("H_u"),
        "bits": known.get("bits"),
        "chance": known.get("chance"),
        "p": known.get("p"),
        "twin": layer.get("domain_information_of_twin"),
    }


def _most_lost(metrics: dict) -> float | None:
    """The most that a domain's loss gains where one expert gives nothing, in nats."""
    rows = metrics["dropped"]
    return max(found["change"] for row in rows for found in row) if rows else None
