"""Whose tokens arrive where: held against the tokens that arrive in a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import sparsecraft as sc
from sparsecraft.dense.forms import is_linear
from sparsecraft.dense.sites import placed_linears
from sparsecraft.dense.tokens import is_causal, reads
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.routing import spread
from tests.cases.families import BERT_LIKE, HEADS, LAYERS, LLAMA_LIKE, VOCAB, D
from tests.cases.members import member_inputs, member_model
from tests.cases.zoo import BART, VISION, ZOO, like

SOURCE, TARGET = 24, 7


def bert_to_bert() -> nn.Module:
    encoder = like(BERT_LIKE, vocab_size=VOCAB, hidden_size=2 * D)
    decoder = like(encoder, hidden_size=D, is_decoder=True, add_cross_attention=True)
    parts = (transformers.BertConfig(**config) for config in (encoder, decoder))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    return transformers.EncoderDecoderModel(config)


def seamless() -> nn.Module:
    """Whose decoder is called `text_decoder`."""
    sizes = like(BART, "d_model", "max_position_embeddings", hidden_size=D)
    return transformers.SeamlessM4TForTextToText(transformers.SeamlessM4TConfig(**sizes))


def nllb_moe() -> nn.Module:
    """Whose blocks do not run on shapes alone."""
    sizes = like(BART, num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1)
    return transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**sizes))


def zoo(group: str, *without: str) -> dict[str, Callable[[], nn.Module]]:
    names = [n for n, m in ZOO.items() if m.group == group and n not in without]
    return {name: functools.partial(member_model, name) for name in names}


# ProphetNet's decoder reads its tokens several times over.
PAIRS = zoo("Encoder-decoders", "prophetnet")
PAIRS |= {"bert_to_bert": bert_to_bert, "seamless": seamless, "nllb_moe": nllb_moe}


def arrivals(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Path of each Linear -> how many tokens arrive there; of those that are called once."""
    found: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(
                lambda _, args, path=path: found.setdefault(path, []).append(
                    args[0].shape[:-1].numel()
                )
            )
    with torch.no_grad():
        model.eval()(**inputs)
    return {path: rows[0] for path, rows in found.items() if len(rows) == 1}


@pytest.mark.parametrize("family", PAIRS)
def test_what_reads_the_source_and_what_the_target(family):
    model = PAIRS[family]()
    ids = torch.randint(3, 90, (1, SOURCE))
    wanted = {SOURCE: "input", TARGET: "decoder"}
    sites = {at.path for at in placed_linears(model) if at.at("linear")}
    found = arrivals(model, {"input_ids": ids, "decoder_input_ids": ids[:, :TARGET]})
    found = {path: rows for path, rows in found.items() if path in sites}
    assert {path: reads(model, path) for path in found} == {
        path: wanted[rows] for path, rows in found.items()
    }
    crossing = [path for path, rows in found.items() if rows == SOURCE and is_causal(model, path)]
    assert len(crossing) == 2 * LAYERS


def mllama() -> tuple[nn.Module, dict[str, Tensor]]:
    vision = like(
        VISION, "num_attention_heads", attention_heads=HEADS, num_global_layers=1,
        vision_output_dim=2 * D, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]],
        max_num_tiles=1,
    )  # fmt: skip
    text = like(LLAMA_LIKE, num_hidden_layers=2, cross_attention_layers=[1])
    config = transformers.MllamaConfig(vision_config=vision, text_config=text)
    inputs = {
        "input_ids": torch.randint(3, 90, (1, TARGET)),
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, TARGET, 1, 1, dtype=torch.long),
    }
    return transformers.MllamaForConditionalGeneration(config), inputs


def test_what_attends_to_images_reads_a_towers_tokens():
    model, inputs = mllama()
    found = arrivals(model, inputs)
    assert {
        path: rows for path, rows in found.items() if "language_model" in path and rows != TARGET
    } == {
        path: rows
        for path, rows in found.items()
        if "language_model" in path and reads(model, path) == "tower"
    }
    cross = "model.language_model.layers.1.cross_attn"
    assert reads(model, f"{cross}.k_proj") == "tower" and reads(model, f"{cross}.q_proj") == "input"


@pytest.mark.parametrize("family", ["bart", "t5gemma", "switch_transformers"])
def test_masks_of_the_source_lie_over_the_source(family):
    """The target, twice as short, was laid over it twice."""
    model = member_model(family)
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2), certify=False)
    ids, real = torch.randint(3, 90, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    real[1, 4:] = 0
    labels = torch.randint(3, 90, (2, 6))
    labels[0, 2:] = -100
    inputs = {"input_ids": ids, "attention_mask": real, "labels": labels}
    with sc.trace(model) as routing:
        model(**inputs)
    masks = layer_masks(model, inputs, None, routing)
    counted = {name: found.counted(masks(name)) for name, found in routing.items()}
    wanted = {24: real.flatten().bool(), 12: labels.flatten() != -100}
    assert {len(mask) for mask in counted.values()} == {12, 24}
    assert all(torch.equal(mask, wanted[len(mask)]) for mask in counted.values())


def test_towers_have_no_padding():
    model, inputs = member_model("llava"), member_inputs("llava")
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2), certify=False)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with sc.trace(model) as routing:
        model(**inputs)
    masks = layer_masks(model, inputs, None, routing)
    towers = [name for name in routing if model.get_submodule(name).reads == "tower"]
    assert towers and all(masks(name) is None for name in towers)
    assert all(routing[name].load_E(masks(name)).sum() > 0.99 for name in routing)


@pytest.mark.parametrize("rows", [3, 8, 12, 13])
def test_a_mask_of_other_tokens_is_refused(rows):
    mask = torch.tensor([True, False, True, True])
    with pytest.raises(SparsecraftError, match="A mask of 4 tokens lies over"):
        spread(mask, rows, 1)
    assert spread(mask, 8, 2).tolist() == [True, True, False, False, True, True, True, True]


def test_loads_of_a_decoder_that_reads_its_tokens_several_times_are_of_all(caplog):
    model = member_model("prophetnet")
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2), certify=False)
    ids = torch.randint(3, 90, (2, 12))
    inputs = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) > 8, -100)}
    with sc.trace(model) as routing:
        model(**inputs)
    masks = layer_masks(model, inputs, None, routing)
    name = "prophetnet.decoder.layers.0.feed_forward.intermediate"
    assert masks(name) is None and len(routing[name].logits_TE) == 72
    assert "count all tokens" in caplog.text
