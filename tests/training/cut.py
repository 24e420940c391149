"""Small trainings of every task, to run in one process or under torchrun: `python -m
tests.training.cut FOLDER MICRO_BATCH` writes what process 0 logged and trained."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import sparsecraft as sc
from sparsecraft.dense.sharing import gathered
from tests import tiny

TASKS = ("causal", "packed", "seq2seq", "classification")
# Nine rows in batches of four: of the last batch of an epoch one row is there, so that one of two
# processes has none.
OPTIONS = {"steps": 5, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "log_every": 2,
           "progress": False}  # fmt: skip


def rows(task: str, count: int = 9) -> list[dict]:
    """Rows of very unequal length; the first of them as long as most others together."""
    draw = random.Random(0)
    words = [" ".join(draw.choices(tiny.WORDS, k=n)) for n in (12, 1, 2, 1, 3, 1, 2, 8, 1, 2)]
    pairs = [{"prompt": f"say {text}", "completion": text} for text in words[:count]]
    if task == "classification":
        return [{"text": row["prompt"], "label": i % 3} for i, row in enumerate(pairs)]
    return pairs


def dense(task: str) -> torch.nn.Module:
    """A model without dropout, whose head is far from even: a loss twice too large is seen."""
    torch.manual_seed(3)
    size = {"vocab_size": len(tiny.tokenizer()), "pad_token_id": 0}
    if task == "seq2seq":
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4,
            decoder_start_token_id=0, dropout_rate=0.0, **size,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()
    if task == "classification":
        config = transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, **size,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()
    return tiny.llama()


def converted(task: str, **changes) -> torch.nn.Module:
    model = dense(task)
    options = {"num_experts": 4, "adapter_dim": 8, "lora_rank": 0, "dropout": 0.0}
    sc.convert(model, sc.recipes.camelidae(**(options | changes)), certify=False)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".experts." in name or ".router." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def train(task: str, folder: Path, data: list[dict], micro_batch: int, **options) -> dict:
    """The log, the report and the trained tensors of one training, as process 0 has them."""
    # Of its own for each process: one would read the file while another begins to write it.
    path = tiny.write_rows(folder / f"{task}-{os.environ.get('RANK', 0)}.jsonl", data)
    model = options.pop("model")
    options = {**OPTIONS, "packing": task == "packed", "micro_batch": micro_batch, **options}
    report = sc.train(model, path, folder / f"{task}-out", tokenizer=tiny.tokenizer(), **options)
    entry = model.sparsecraft.report["training"][-1]
    moved = {n: gathered(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
    return {"log": entry["log"], "loss": report.loss, "tensors": moved}


def members(folder: Path, micro_batch: int) -> Iterator[dict]:
    """Trainings that must not depend on the cut: unequal rows without a balance loss, which is no
    mean over tokens, and equal rows with a large one."""
    for task in TASKS:
        model = converted(task, balance="none")
        yield train(task, folder, rows(task), micro_batch, model=model)
    model = converted("seq2seq", balance="switch", balance_coef=20.0)
    data = rows("seq2seq")[:1] * 9
    yield train("seq2seq", folder, data, micro_batch, model=model, overwrite=True)


if __name__ == "__main__":
    out, micro = Path(sys.argv[1]), int(sys.argv[2])
    for number, member in enumerate(members(out, micro)):
        if torch.distributed.get_rank() == 0:
            torch.save(member.pop("tensors"), out / f"{number}.pt")
            (out / f"{number}.json").write_text(json.dumps(member))
