"""One small folder or file of each kind that we read, and what reads it."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import sparsecraft as sc
from sparsecraft import hub, recipes
from sparsecraft.data.rows import Unused, read_rows
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.dense.packaged import _extract
from sparsecraft.errors import SparsecraftError
from sparsecraft.training.progress import ProgressBar
from tests import tiny

TOKENS = torch.tensor([[5, 17, 200, 33, 8, 2]])
CONVERTED = {"num_experts": 2, "top_k": 1, "adapter_dim": 4}


@dataclass(frozen=True)
class Kind:
    """One kind of what we read.

    Attributes:
        name: of its folder below the root.
        read: reads a copy of it; what it gives are the model's logits, if it has any.
        own: whether we wrote it, so that other logits than before are a fault.
        signed: whether its recipe.json is signed anew after an edit.
    """

    name: str
    read: Callable[[Path], Tensor | None]
    own: bool = False
    signed: bool = False


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load(folder: Path) -> Tensor:
    model = sc.load(folder)
    load_tokenizer(folder)
    return logits(model)


def dense(folder: Path) -> Tensor:
    load_tokenizer(folder)
    return logits(hub.load_dense(str(folder)))


def through_transformers(folder: Path) -> Tensor:
    try:
        return logits(transformers.AutoModelForCausalLM.from_pretrained(folder))
    except SparsecraftError:
        raise
    except Exception as error:
        # Before it knows that the folder is ours, transformers speaks for itself.
        if any("sparsecraft" in f.filename for f in traceback.extract_tb(error.__traceback__)[-3:]):
            raise
        raise SparsecraftError(f"by transformers: {error}") from None


def lora(folder: Path) -> Tensor:
    model = hub.load_dense(str(folder.parents[2] / "made" / "base"))
    recipe = recipes.molora(num_experts=1, rank=2)
    sc.convert(model, recipe, sources=[str(folder)], certify=False)
    return logits(model)


def source(folder: Path) -> Tensor:
    model = hub.load_dense(str(folder.parents[2] / "made" / "base"))
    sc.convert(model, recipes.btx(num_experts=2), sources=[str(folder)] * 2, certify=False)
    return logits(model)


def imported(folder: Path) -> Tensor:
    return logits(sc.import_moe(folder))


def rows(folder: Path) -> None:
    for path in sorted(set(folder.iterdir()) - {folder / "evil.py"}):
        list(read_rows(path, "train", Unused()))


def state(folder: Path) -> Tensor:
    """Go on with a run that was interrupted at its second step of three."""
    made = folder.parents[2] / "made"
    return logits(sc.load(_trained(made, folder / "out", resume=True)))


def wheel(folder: Path) -> None:
    for path in sorted(folder.glob("*.whl")):
        _extract(path, "model.safetensors", beside=True)


def inspect(folder: Path) -> None:
    from sparsecraft.evaluation.report import describe

    describe(folder)


KINDS = (
    Kind("base", dense),
    Kind("sharded_base", dense),
    Kind("bin_base", dense),
    Kind("source", source),
    Kind("lora", lora),
    Kind("checkpoint", load, own=True),
    Kind("checkpoint", load, signed=True),
    Kind("sharded", load, own=True),
    Kind("standalone", load, own=True),
    Kind("standalone", load, signed=True),
    Kind("standalone", through_transformers, own=True),
    Kind("peft", load, own=True),
    Kind("checkpoint", inspect, signed=True),
    Kind("mixtral", imported),
    Kind("mixtral", dense),
    Kind("rows", rows),
    Kind("state", state, own=True),
    Kind("old_state", state),
    Kind("wheel", wheel),
)


def make(root: Path) -> None:
    """One of each kind below `root`."""
    base = tiny.save_dense(root / "base", width=32)
    for name, more in {"sharded_base": {"max_shard_size": "40KB"}, "source": {}}.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model.save_pretrained(root / name, **more)
        tiny.tokenizer().save_pretrained(root / name)
    shutil.copytree(base, root / "bin_base")
    (root / "bin_base" / "model.safetensors").unlink()
    torch.save(tiny.llama().state_dict(), root / "bin_base" / "pytorch_model.bin")
    _make_ours(root, base)
    _make_lora(root, base)
    _make_rows(root / "rows")
    _make_states(root)
    _make_wheel(root / "wheel", root / "base")


def _make_ours(root: Path, base: str) -> None:
    model = hub.load_dense(base)
    sc.convert(model, recipes.camelidae(**CONVERTED), certify=False)
    sc.save(model, root / "checkpoint")
    sc.save(model, root / "sharded", shard_size=10_000)
    model = hub.load_dense(base)
    sc.convert(model, recipes.upcycling(num_experts=2, top_k=1), certify=False)
    sc.save(model, root / "standalone", standalone=True)
    sc.export(model, "mixtral", root / "mixtral")
    model = hub.load_dense(base)
    sc.convert(model, recipes.molora(num_experts=2, rank=2), certify=False)
    sc.export(model, "peft", root / "peft")


def _make_lora(root: Path, base: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(root / "lora")


def _make_rows(folder: Path) -> None:
    import gzip

    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    tiny.write_rows(folder / "chat.jsonl", tiny.chat_rows(6))
    (folder / "array.json").write_text(json.dumps(tiny.chat_rows(6), indent=1))
    (folder / "labels.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "chat.jsonl").read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(tiny.chat_rows(6)), folder / "rows.parquet")


def _make_wheel(folder: Path, base: Path) -> None:
    import zipfile

    folder.mkdir()
    with zipfile.ZipFile(folder / "model-1-py3-none-any.whl", "w") as archive:
        for path in base.iterdir():
            archive.write(path, f"package/model/{path.name}")


def _make_states(root: Path) -> None:
    """An interrupted run's folder, and the same as versions wrote it that kept no digests."""
    plain = ProgressBar.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    ProgressBar.on_step_end = interrupt
    try:
        _trained(root, root / "state" / "out")
    except KeyboardInterrupt:
        pass
    finally:
        ProgressBar.on_step_end = plain
    old = shutil.copytree(root / "state", root / "old_state")
    for path in old.rglob("digests.json"):
        path.unlink()
    for path in old.rglob("run.json"):
        run = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in run.items() if "digest" not in k}))


def _trained(made: Path, out: Path, **options: Any) -> Path:
    how = {"steps": 3, "save_every": 1, "batch_size": 2, "max_length": 32, "progress": False}
    sc.train(made / "checkpoint", made / "rows" / "chat.jsonl", out, **how, **options)
    return out
