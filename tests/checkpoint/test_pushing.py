"""What goes to the hub is a checkpoint of ours, with its card."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch

import sparsecraft as sc
from tests import tiny

IDS = torch.arange(3, 19)[None]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub as a list of (folder, arguments), without a network."""
    pushed = []

    def upload_folder(self, *, folder_path, **kwargs):
        out = shutil.copytree(folder_path, tmp_path / "hub" / str(len(pushed)))
        pushed.append((out, kwargs))
        return "what the hub says"

    repo = huggingface_hub.RepoUrl("https://huggingface.co/user/moe")
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda *args, **kwargs: repo)
    monkeypatch.setattr(api, "create_branch", lambda *args, **kwargs: None)
    monkeypatch.setattr(api, "upload_folder", upload_folder)
    return pushed


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def converted(tmp_path):
    model = sc.hub.load_dense(tiny.save_dense(tmp_path / "base"))
    sc.convert(model, sc.recipes.upcycling(4, 2))
    return model


def test_all_of_a_checkpoint_is_pushed_and_the_model_keeps_its_name(hub, tmp_path):
    model = converted(tmp_path)
    unsaved = model.name_or_path
    said = model.push_to_hub("user/moe", tags=["moe"], revision="main", commit_message="Mine")
    assert said == "what the hub says" and model.name_or_path == unsaved
    folder, given = hub[-1]
    asked = (given["repo_id"], given["revision"], given["commit_message"])
    assert asked == ("user/moe", "main", "Mine")
    assert torch.equal(logits(sc.load(folder)), logits(model))
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "sparsecraft" and card.data.license == "apache-2.0"
    assert card.data.tags == ["moe"] and "# upcycling" in card.text
    assert (folder / "tokenizer.json").is_file()

    home = sc.save(model, tmp_path / "moe")
    model.push_to_hub("user/moe", max_shard_size="20KB", standalone=True)
    assert model.name_or_path == model.config._name_or_path == str(home)
    folder = hub[-1][0]
    assert len([*folder.glob("moe-*.safetensors")]) > 1
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(logits(sc.load(folder)), logits(model))


def test_what_cannot_be_saved_is_not_pushed(hub, tmp_path):
    model = converted(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(sc.SparsecraftError, match="not finite"):
        model.push_to_hub("user/moe")
    assert not hub


def test_save_pretrained_names_what_uploads(tmp_path):
    for asked in ({"push_to_hub": True}, {"variant": "fp16"}):
        with pytest.raises(sc.SparsecraftError, match=rf"{next(iter(asked))}; .*model.push_to_hub"):
            converted(tmp_path).save_pretrained(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_reverted_model_is_pushed_as_transformers_does(tmp_path):
    model = converted(tmp_path)
    sc.revert(model)
    assert model.push_to_hub.__func__ is type(model).push_to_hub
