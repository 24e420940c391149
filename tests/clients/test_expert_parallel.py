"""transformers' expert parallelism: two processes, each with half of the experts of every layer,
give what one gives."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers

import sparsecraft as sc
from benchmarks.scale.launching import Launch
from tests.clients.starting import IDS, converted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="two processes by gloo"),
]

PROGRAM = """
import sys, torch
from benchmarks.scale.experts import loaded
from tests.clients.starting import IDS
model = loaded(sys.argv[1], torch.float32, processes=2)
with torch.no_grad():
    logits = model(IDS).logits
experts = [p for name, p in model.named_parameters() if ".experts." in name]
assert experts and all(getattr(p, "_local_tensor", p).shape[0] == 2 for p in experts)
if torch.distributed.get_rank() == 0:
    torch.save(logits, sys.argv[2])
"""


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "granite"])
def test_two_processes_give_what_one_gives(target, tmp_path):
    model = converted(tmp_path, "upcycling")
    sc.export(model, target, tmp_path / "export")
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = Launch("", "ddp", [], processes=2)
    command = [*launch.command("")[:-2], str(tmp_path / "program.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "export"), str(tmp_path / "logits.pt")],
        env=launch.variables(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), plain(IDS).logits)
