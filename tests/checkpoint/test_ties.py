"""Which weights a folder's configuration ties, as the model's own class says it."""

from __future__ import annotations

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.errors import CheckpointError
from tests.cases import randomize_new
from tests.cases.members import member_inputs, member_model, member_outputs
from tests.cases.zoo import BART, HEADS, LAYERS, VOCAB, D, F

# Whose head is no input embedding, beside tie_word_embeddings=True: it is that of the decoder, or
# of a class that ties none.
UNLIKE = {
    "decoder's": lambda: member_model("t5gemma"),
    "none's": lambda: transformers.BigBirdPegasusForCausalLM(
        transformers.BigBirdPegasusConfig(**BART, tie_word_embeddings=True)
    ).eval(),
    "none's, in another place": lambda: transformers.CpmAntForCausalLM(
        transformers.CpmAntConfig(
            vocab_size=VOCAB, hidden_size=D, dim_ff=F, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, dim_head=D // HEADS, prompt_types=4, prompt_length=2,
        )
    ).eval(),
}  # fmt: skip


@pytest.mark.parametrize("head", UNLIKE)
def test_a_head_that_is_no_input_embedding_comes_back(tmp_path, head):
    torch.manual_seed(0)
    model = UNLIKE[head]()
    inputs = member_inputs("t5gemma" if model.config.is_encoder_decoder else "llama")
    if head != "decoder's":
        inputs = {"input_ids": inputs["input_ids"]}
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2))
    randomize_new(model)
    wanted = member_outputs(model, inputs)
    sc.save(model, tmp_path / "saved")
    assert torch.equal(member_outputs(sc.load(tmp_path / "saved"), inputs), wanted)


@pytest.mark.parametrize("family", ["qwen2", "t5gemma"])
def test_a_head_of_its_own_is_refused_where_the_class_ties_it(tmp_path, family):
    model = member_model(family)
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2), certify=False)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with pytest.raises(CheckpointError, match=r"'lm_head[\w.]*weight' is a weight of its own"):
        sc.save(model, tmp_path / "saved")
    model.tie_weights()
    sc.save(model, tmp_path / "saved")
