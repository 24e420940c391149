"""Lightning: a module that holds a converted model trains, writes a checkpoint, and reads it."""

from __future__ import annotations

import pytest
import torch

from tests.clients.starting import IDS, RECIPES, converted, logits

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.slow


class Module(lightning.LightningModule):
    def __init__(self, folder: str, recipe: str):
        super().__init__()
        from pathlib import Path

        self.save_hyperparameters()
        self.model = converted(Path(folder), recipe)

    def training_step(self, batch, index):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_of_lightning_holds_the_whole_function(recipe, tmp_path):
    module = Module(str(tmp_path), recipe)
    before = logits(module.model)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(IDS.repeat(2, 1), batch_size=2))
    trained = logits(module.model)
    assert not torch.equal(trained, before)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "run.ckpt")
    assert torch.equal(logits(again.model), trained)
