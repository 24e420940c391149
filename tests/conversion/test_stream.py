"""Conversion from file to file: the folder of `save`, in shards, after a kill, certified."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import sparsecraft as sc
from sparsecraft.checkpoint import shards
from sparsecraft.cli.main import main
from sparsecraft.conversion.stream import _Stream, convert_files
from sparsecraft.dense.loading import load_model
from sparsecraft.dense.probes import random_probe
from sparsecraft.errors import CertificateError, CheckpointError, RecipeError, SourceError
from sparsecraft.evaluation.streamed import _fill_buffers
from sparsecraft.moe.names import unique_tensors
from sparsecraft.recipe.recipe import Quantize
from sparsecraft.recipe.selections import Sentence
from tests import tiny
from tests.cases import FAMILIES, batch, dense, logits

UPCYCLING = sc.recipes.upcycling(num_experts=4)
BTX = sc.recipes.btx(num_experts=4)
RECIPES = {
    "upcycling": UPCYCLING,
    "camelidae": sc.recipes.camelidae(num_experts=4, adapter_dim=8),
    "molora": sc.recipes.molora(4),
    "mixlora": sc.recipes.mixlora(),
    "mov": dataclasses.replace(
        sc.recipes.mov(4), edits=tuple(
            dataclasses.replace(e, experts=dataclasses.replace(e.experts, init_std=0.1))
            for e in sc.recipes.mov(4).edits
        ), exact_at_start=False,
    ),
}  # fmt: skip


def base(tmp_path: Path, family: str = "llama", seed: int | None = None, name: str = "base") -> str:
    """A folder of the family's model, moved a little if there is a seed."""
    model = dense(family)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def in_memory(folder: str, recipe, out: Path, sources=(), dtype=None, seed=0, **saving) -> Path:
    model = sc.hub.load_dense(folder, dtype=dtype)
    sc.convert(model, recipe, certify=False, seed=seed, sources=sources)
    return sc.save(model, out, **saving)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(ours: Path, theirs: Path) -> None:
    ours, theirs = contents(ours), contents(theirs)
    assert ours.keys() == theirs.keys()
    for name, data in ours.items():
        assert data == theirs[name], f"{name} differs"


# ----------------------------------------------------------------------- the same folder, to a byte


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_folder_is_that_of_convert_and_save(family, recipe, tmp_path):
    folder = base(tmp_path, family)
    for standalone in (False, True):
        out, wanted = tmp_path / f"{standalone}", tmp_path / f"wanted {standalone}"
        in_memory(folder, RECIPES[recipe], wanted, standalone=standalone, seed=7)
        convert_files(folder, RECIPES[recipe], out, standalone=standalone, seed=7, certify=False)
        same(out, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("others", ["mean", "base"])
def test_sources_give_what_they_give_in_memory(family, others, tmp_path):
    folder, recipe = base(tmp_path, family), sc.override(BTX, {"others": others})
    sources = [folder, base(tmp_path, family, 1, "one")]
    in_memory(folder, recipe, tmp_path / "wanted", sources)
    report = convert_files(folder, recipe, tmp_path / "out", sources=sources, certify=False)
    same(tmp_path / "out", tmp_path / "wanted")
    assert report.sources == tuple(sources)
    model = sc.load(tmp_path / "out")
    converted = sc.hub.load_dense(folder)
    sc.convert(converted, recipe, certify=False, sources=sources)
    assert torch.equal(logits(model, batch(family)), logits(converted, batch(family)))


def test_another_dtype_and_shards_are_those_of_save(tmp_path):
    folder = base(tmp_path)
    options = {"dtype": torch.bfloat16, "shard_size": 20_000, "standalone": True}
    in_memory(folder, UPCYCLING, tmp_path / "wanted", **options)
    convert_files(folder, UPCYCLING, tmp_path / "out", certify=False, **options)
    same(tmp_path / "out", tmp_path / "wanted")
    assert sc.load(tmp_path / "out").dtype == torch.bfloat16


def test_a_bank_is_made_one_expert_at_a_time(tmp_path):
    stream = _Stream(base(tmp_path), UPCYCLING, (), dtype=None, unrelated=False, seed=0)
    tensors = stream.tensors(tmp_path / "out", standalone=False)
    banks = [tensor for name, tensor in tensors.items() if ".experts." in name]
    assert len(banks) == 8  # gate_up and down, and their biases, of two layers
    for bank in banks:
        pieces = list(bank.make())
        assert [tuple(piece.shape) for piece in pieces] == [bank.shape[1:]] * 4
    assert all(tensor.is_meta for tensor in unique_tensors(stream.model).values())


def test_what_cannot_be_made_tensor_by_tensor_is_refused(tmp_path):
    folder, out = base(tmp_path), tmp_path / "out"
    with pytest.raises(RecipeError, match=r"'moefication' has split experts.*convert in memory"):
        convert_files(folder, sc.recipes.moefication(), out)
    quantized = dataclasses.replace(sc.recipes.lora(2), backbone=Quantize())
    with pytest.raises(RecipeError, match="quantized base"):
        convert_files(folder, quantized, out)
    torch.manual_seed(3)
    stranger = type(dense("llama"))(dense("llama").config)
    stranger.save_pretrained(tmp_path / "stranger")
    with pytest.raises(SourceError, match="no common ancestor"):
        convert_files(folder, BTX, out, sources=[folder, tmp_path / "stranger"])
    assert not out.exists() and {p.name for p in tmp_path.iterdir()} == {"base", "stranger"}


# ------------------------------------------------------------------------------------------- shards


def test_a_large_checkpoint_is_saved_in_shards(tmp_path):
    folder = base(tmp_path)
    whole = in_memory(folder, UPCYCLING, tmp_path / "whole")
    split = in_memory(folder, UPCYCLING, tmp_path / "split", shard_size=20_000)
    index = json.loads((split / "moe.safetensors.index.json").read_text())
    files = sorted(path.name for path in split.glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files[0] == f"moe-00001-of-{count:05}.safetensors"
    tensors = {name: t for file in files for name, t in load_file(split / file).items()}
    wanted = load_file(whole / "moe.safetensors")
    assert index["weight_map"].keys() == tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    total = sum(t.numel() * t.element_size() for t in wanted.values())
    assert index["metadata"]["total_size"] == total
    digests = [json.loads((f / "recipe.json").read_text())["tensors"] for f in (whole, split)]
    assert digests[0] == digests[1]
    found, inputs = sc.load(split), batch("llama")
    assert torch.equal(logits(found, inputs), logits(sc.load(whole), inputs))
    sc.save(found, split, overwrite=True)  # no shard of the old folder stays
    assert {p.name for p in split.glob("moe*")} == {"moe.safetensors"}


def test_a_missing_shard_or_tensor_is_noticed(tmp_path):
    split = in_memory(base(tmp_path), UPCYCLING, tmp_path / "split", shard_size=20_000)
    path = split / "moe.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    kept = {n: f for n, f in index["weight_map"].items() if f != index["weight_map"][first]}
    path.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(CheckpointError, match=r"moe\.safetensors\.index\.json has changed"):
        sc.load(split)
    path.write_text(json.dumps(index))
    (split / index["weight_map"][first]).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        sc.load(split)
    with pytest.raises(CheckpointError, match="shard size is 0"):
        shards.write(split / "moe.safetensors", {}, 0)


# ------------------------------------------------------------------------------------ after a kill


def deep(tmp_path: Path) -> str:
    """A model of so many tensors that a conversion lasts long enough to be killed."""
    torch.manual_seed(0)
    config = tiny.llama().config
    config.num_hidden_layers = 64
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    return str(tmp_path / "deep")


def command(folder: str, out: Path, *more: str) -> list[str]:
    options = ["--num-experts", "4", "--model", folder, "--out", str(out)]
    return ["convert", "upcycling", *options, "--stream", "--shard-size", "1e-6", *more]


def test_a_killed_conversion_goes_on(tmp_path, capsys):
    folder, out = deep(tmp_path), tmp_path / "out"
    wanted = in_memory(folder, UPCYCLING, tmp_path / "wanted", shard_size=1000)
    left = tmp_path / ".out.partial"
    arguments = [sys.executable, "-m", "sparsecraft", *command(folder, out, "--no-certify")]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(left.glob("moe-*"))) < 3:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    finished = json.loads((left / "progress.json").read_text())["finished"]
    assert 2 <= len(finished) < 3 * 64
    times = {file: (left / file).stat().st_mtime_ns for file in finished}

    assert main(command(folder, out, "--no-certify", "--resume", "--seed", "1")) == 1
    assert "options.seed was 0 and is 1" in capsys.readouterr().err
    assert main(command(folder, out, "--no-certify", "--resume")) == 0
    output = capsys.readouterr()
    assert f"{len(finished)} finished file(s) were left and are kept" in output.out
    assert "converting" in output.err and "converting" not in output.out
    same(out, wanted)
    assert {file: (out / file).stat().st_mtime_ns for file in finished} == times
    assert not left.exists()


def test_what_was_left_is_checked(tmp_path, monkeypatch):
    folder, out = base(tmp_path), tmp_path / "out"

    class Stop(BaseException):
        pass

    def stop(line):
        if "Going on" in line:
            raise Stop

    def interrupted(**options):
        with pytest.raises(Stop):
            convert_files(folder, UPCYCLING, out, shard_size=20_000, say=stop, **options)

    with pytest.raises(CheckpointError, match="nothing to resume"):
        convert_files(folder, UPCYCLING, out, resume=True)

    def no_index(path, data):  # it comes after the last shard
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=r"space.*--resume"):
        patched.setattr(shards, "write_json", no_index)
        convert_files(folder, UPCYCLING, out, shard_size=20_000)
    left = tmp_path / ".out.partial"
    files = sorted(left.glob("moe-*"))
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].unlink()
    (left / "progress.json.7.tmp").write_text("{")
    known = json.loads((left / "progress.json").read_text())
    assert known["finished"].keys() == {file.name for file in files}
    interrupted(resume=True)
    again = json.loads((left / "progress.json").read_text())["finished"]
    assert known["finished"].keys() - again.keys() == {file.name for file in files[:3]}
    other = sc.override(UPCYCLING, {"router.temperature": 0.5})
    with pytest.raises(CheckpointError, match=r"recipe\.edits was .* and is "):
        convert_files(folder, other, out, shard_size=20_000, resume=True)
    weights = Path(folder) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    os.utime(weights, ns=(before, before + 1))
    with pytest.raises(CheckpointError, match=r"base\.model\.safetensors was .* and is "):
        convert_files(folder, UPCYCLING, out, shard_size=20_000, resume=True)
    os.utime(weights, ns=(before, before))
    convert_files(folder, UPCYCLING, out, shard_size=20_000, resume=True, certify=False)
    same(out, in_memory(folder, UPCYCLING, tmp_path / "wanted", shard_size=20_000))


# ---------------------------------------------------------------------------------- the certificate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["upcycling", "camelidae", "molora", "mixlora"])
def test_exact_recipes_are_exact_layer_by_layer(family, recipe, tmp_path):
    folder = base(tmp_path, family)
    report = convert_files(folder, RECIPES[recipe], tmp_path / "out")
    layers = sc.load(tmp_path / "out").sparsecraft.layers
    assert report.certificate.exact and report.certificate.layers == len(layers) > 0
    assert f"exact in {len(layers)} layers" in str(report.certificate)
    assert "layer output difference" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "opt", "t5", "vit"])
def test_the_difference_is_that_of_the_worst_layer(family, tmp_path):
    """Measured again with both models in memory, on the hidden states of the converted one."""
    folder = base(tmp_path, family)
    sources = [folder, base(tmp_path, family, 1, "one")]
    report = convert_files(folder, BTX, tmp_path / "out", sources=sources)
    original, converted = sc.hub.load_dense(folder), sc.load(tmp_path / "out")
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for item in converted.sparsecraft.plan:
        converted.get_submodule(item.site.path).register_forward_hook(
            lambda module, args, out, path=item.site.path: calls.update({path: (args[0], out)})
        )
    shares = []
    with torch.no_grad():
        converted(**random_probe(converted))
        for item in converted.sparsecraft.plan:
            wanted, found = calls[item.site.path]
            for member in item.site.members:
                wanted = original.get_submodule(member)(wanted)
            scale = wanted.abs() + wanted.pow(2).mean(-1, keepdim=True).sqrt()
            shares.append(((found - wanted).abs() / scale).max().item())
    certificate = report.certificate
    assert not certificate.exact and len(shares) == certificate.layers
    share = certificate.max_difference / certificate.scale
    assert share == pytest.approx(max(shares), rel=1e-4)


def test_a_false_claim_is_an_error_and_nothing_is_kept(tmp_path):
    folder = base(tmp_path)
    false = dataclasses.replace(
        sc.recipes.upcycling(num_experts=4, renormalize=False), exact_at_start=True
    )
    with pytest.raises(CertificateError, match="different in 2 layers"):
        convert_files(folder, false, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_that_are_in_no_file_are_those_of_a_loaded_model(family, tmp_path):
    folder = base(tmp_path, family)
    skeleton = load_model(Path(folder), None, "meta")
    _fill_buffers(skeleton)
    wanted = dict(sc.hub.load_dense(folder).named_buffers())
    hidden = [n for n, b in skeleton.named_buffers() if not b.is_meta]
    assert set(hidden) == set(wanted) - set(unique_tensors(skeleton))
    for name in hidden:
        assert torch.equal(skeleton.get_buffer(name), wanted[name]), name


def test_layers_that_read_the_batch_are_compared_too(tmp_path):
    recipe = sc.recipes.molora(2)
    edits = [
        dataclasses.replace(edit, router=dataclasses.replace(edit.router, decides=Sentence()))
        for edit in recipe.edits
    ]
    recipe = dataclasses.replace(recipe, edits=tuple(edits))
    certificate = convert_files(base(tmp_path), recipe, tmp_path / "out").certificate
    assert certificate.exact and certificate.ran == certificate.layers > 0


def test_options_that_do_not_fit_a_stream_are_refused(tmp_path, capsys):
    folder, out = base(tmp_path), tmp_path / "out"
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(2))
    assert main([*command(folder, out), "--data", data]) == 1
    assert "--data is not for --stream" in capsys.readouterr().err
    assert main([*command(folder, out), "--domains", f"a={data}"]) == 1
    assert "--domains is not for --stream" in capsys.readouterr().err
    plain = ["convert", "upcycling", "--model", folder, "--out", str(out), "--resume"]
    assert main(plain) == 1
    assert "--resume is for --stream" in capsys.readouterr().err
    assert main([*command(folder, out), "--no-progress"]) == 0
    output = capsys.readouterr()
    assert "of each beside its dense module" in output.out and "converting" not in output.err


def test_routers_that_start_from_domains_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="start from domains or data"):
        convert_files(str(tmp_path), sc.recipes.nexus(3), tmp_path / "out")
