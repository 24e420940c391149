"""What is in a folder of ours is what was written, or it is named: no bit changes in silence."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import sparsecraft as sc
from sparsecraft.checkpoint.load import load_any
from sparsecraft.checkpoint.shards import digest
from sparsecraft.errors import CheckpointError, HubError
from tests import tiny
from tests.checkpoint import folders
from tests.golden.test_format1 import FORMAT1

ACCEPT = r"sparsecraft inspect .* --accept-edits"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Where each folder is written once; who changes one takes a copy, or puts it back."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="module")
def written(shelf):
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            known = kind in folders.CHECKPOINTS
            made[kind] = folders.CHECKPOINTS[kind](shelf) if known else folders.adapter(shelf, kind)
        return made[kind]

    return get


@pytest.fixture
def copy(written, tmp_path):
    return lambda kind: shutil.copytree(written(kind), tmp_path / "copy")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="sparsecraft")
    return caplog


FLIPS = {"checkpoint": 60, "sharded": 60, "self-contained": 24, "save_pretrained": 40}


@pytest.mark.parametrize("kind", folders.CHECKPOINTS)
def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(kind, copy, said):
    folder = copy(kind)
    wanted = folders.read(folder)
    for path in folders.flips(folder, FLIPS[kind]):
        said.clear()
        try:
            found = folders.read(folder)
        except HubError:  # a tokenizer that no class reads
            assert path.name in said.text
        except CheckpointError as error:
            assert path.name in str(error), f"{path.name}: {error}"
        else:
            free = path.name in folders.FREE
            assert folders.same(found, wanted) if free else kind == "save_pretrained"
            assert free or path.name in said.text
    assert folders.same(folders.read(folder), wanted)


@pytest.mark.parametrize("kind", folders.PEFT)
def test_no_flipped_bit_of_a_peft_folder_goes_unnoticed(kind, copy, shelf):
    folder, dense = copy(kind), sc.hub.load_dense(folders.base(shelf))
    doors = [sc.load, lambda f: PeftModel.from_pretrained(dense, f)]
    for path in folders.flips(folder, 20):
        for door in doors:
            if path.name in folders.FREE:
                continue  # read below
            with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
                door(folder)
    (folder / "README.md").write_text("mine")
    assert torch.equal(folders.logits(sc.load(folder)), folders.logits(doors[1](folder)))


@pytest.mark.parametrize("kind", ["checkpoint", "sharded", "PESC"])
def test_a_copy_other_line_ends_and_permissions_are_the_same_folder(kind, copy, written, said):
    folder, wanted = copy(kind), folders.read(written(kind))
    for path in folder.iterdir():
        if b"\0" not in path.read_bytes()[:8000]:  # as git tells text from binary
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        path.chmod(0o400)
    moved = folder.rename(folder.with_name("renamed"))
    os.utime(moved / "tokenizer.json", (0, 0))
    assert folders.same(folders.read(moved), wanted)
    assert not said.text


def test_our_json_may_be_spaced_otherwise_and_tensors_written_anew(copy, written):
    folder = copy("sharded")
    for path in [*folder.glob("*.index.json"), folder / "report.json", folder / "config.json"]:
        path.write_text(json.dumps(json.loads(path.read_text())))
    for path in folder.glob("*.safetensors"):
        save_file(dict(reversed(load_file(path).items())), path)
    assert folders.same(folders.read(folder), folders.read(written("sharded")))


ADDED = ["additional_chat_templates/tools.jinja", "tokenizer.model", "preprocessor_config.json"]


def test_files_that_appear_or_are_missing_are_named(copy):
    folder = copy("checkpoint")
    for name in [*ADDED, "moe.safetensors.index.json"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError, match=f"{name} is new; .*{ACCEPT}"):
            sc.load(folder)
        (folder / name).unlink()
    for name in ("chat_template.jinja", "report.json", "generation_config.json"):
        kept = (folder / name).rename(folder / f"{name}.bak")
        with pytest.raises(CheckpointError, match=f"{name} is missing; .*{ACCEPT}"):
            sc.load(folder)
        kept.rename(folder / name)
    (folder / "tokenizer.json~").write_text("an editor's")
    (folder / "notes.txt").write_text("the user's")
    assert sc.load(folder)


def test_an_adapter_that_appears_in_a_checkpoint_is_named(copy, said):
    """`sc.load` reads the checkpoint alone, and transformers' Auto classes both."""
    folder = copy("checkpoint")
    (folder / "adapter_config.json").write_text("{}")
    assert sc.load(folder) and "adapter_config.json is new" in said.text


def test_a_template_that_transformers_would_prefer_is_named(tmp_path):
    base = Path(folders.base(tmp_path))
    (base / "chat_template.jinja").unlink()
    folder = folders.checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is new"):
        load_any(str(folder))


def test_a_folder_without_a_record_is_read_as_before(tmp_path):
    folder = shutil.copytree(FORMAT1 / "checkpoints" / "cmoe_trained", tmp_path / "old")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    folders.edit(folder / "report.json", lambda report: report.update(note="mine"))
    assert sc.load(folder)
    peft = shutil.copytree(FORMAT1 / "peft" / "exported_mixlora", tmp_path / "peft")
    folders.edit(peft / "adapter_config.json", lambda config: config.update(inference_mode=False))
    (peft / "chat_template.jinja").write_text("{{ messages }}")
    assert sc.load(peft, base=str(FORMAT1 / "base" / "llama"))


def test_what_a_tokenizer_saves_is_recorded_and_nothing_else(copy, said):
    folder = copy("checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    settings = transformers.GenerationConfig.from_pretrained(folder)
    settings.temperature = 0.5
    settings.save_pretrained(folder)
    model, found = load_any(str(folder))
    assert found.get_vocab() == tokenizer.get_vocab() and not said.text
    assert model.generation_config.temperature == 0.5
    (folder / "generation_config.json").write_text("{}")
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"written: generation_config\.json has changed"):
        sc.load(folder)
    folders.edit(folder / "recipe.json", lambda manifest: manifest.update(base_card=None))
    before = (folder / "recipe.json").read_bytes()
    tokenizer.save_pretrained(folder)
    assert (folder / "recipe.json").read_bytes() == before, "an edit is not signed on the way"


def test_a_tokenizer_beside_save_pretrained_is_named_and_not_refused(copy, said):
    """By transformers' custom it comes by a call of its own, and from other programs."""
    folder = copy("save_pretrained")
    assert sc.load(folder) and not said.text  # Trainer saved the tokenizer after the model
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.model").write_text("another")
    folders.edit(folder / "generation_config.json", lambda data: data.update(temperature=0.1))
    assert sc.load(folder).generation_config.temperature == 0.1
    for name in ("chat_template.jinja", "tokenizer.model", "generation_config.json"):
        assert name in said.text
    folders.edit(folder / "report.json", lambda report: report.clear())
    with pytest.raises(CheckpointError, match=r"report\.json has changed"):
        sc.load(folder)


def test_a_tokenizer_that_was_there_before_is_recorded_as_it_is(tmp_path, said):
    model, out = folders.converted(tmp_path, folders.adapters()), tmp_path / "out"
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    _, found = load_any(str(out))
    assert "<mine>" in found.get_vocab() and not said.text


def test_trainer_goes_on_from_what_was_written_only(copy):
    folder = copy("save_pretrained")
    model = sc.load(folder)
    load = transformers.trainer.load_sharded_checkpoint
    assert load(model, folder, strict=False)
    for path in folders.flips(folder, 20):
        if path.suffix == ".safetensors" or path.name.endswith("index.json"):
            with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
                load(model, folder, strict=False)


def test_a_header_says_nothing_but_its_format(copy):
    path = copy("checkpoint") / "moe.safetensors"
    before = digest(path)
    save_file(load_file(path), path)
    assert digest(path) == before
    save_file(load_file(path), path, metadata={"format": "pt", "made_by": "hand"})
    with pytest.raises(CheckpointError, match="made_by"):
        sc.load(path.parent)


def test_generation_settings_that_nothing_reads_are_one_sentence(copy):
    folder = copy("save_pretrained")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        sc.load(folder)
