"""Whose tokens a batch's mask is of: towers, frames of sound, layers that run on (S, B, D).

Shapes: B sequences, S positions, F frames, E experts.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.dense.tokens import reads
from sparsecraft.errors import SurgeryError
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.masks import of_frames, of_rows
from tests import cases, tiny
from tests.cases.members import member_inputs, member_model

TOWERS = ["clip", "siglip", "llava", "paligemma", "gemma3_vision", "qwen2_5_vl", "qwen3_vl"]
SOUNDS = ["wav2vec2", "hubert", "wavlm", "wav2vec2_conformer"]
SAID = "routing statistics and balance losses count all tokens"


def converted(model, recipe: sc.Recipe | None = None):
    sc.convert(model, recipe or sc.recipes.upcycling(num_experts=3, top_k=1), certify=False)
    cases.randomize_new(model, std=0.5)
    return model


def with_padding(name: str) -> dict[str, torch.Tensor]:
    """The family's inputs; of the second row a part is padding."""
    inputs = dict(member_inputs(name))
    covered = next(inputs[key] for key in ("input_ids", "input_values") if key in inputs)
    inputs["attention_mask"] = torch.ones_like(covered, dtype=torch.long)
    inputs["attention_mask"][1, -covered.shape[1] // 3 :] = 0
    return inputs


def balance(routings, masks) -> float:
    """The recipe's loss by its definition: the mean over layers, by the mask of each."""
    found = [sc.losses.switch_balance(r, masks(name)) for name, r in routings.items()]
    return torch.stack(found).mean().item()


def said(caplog) -> int:
    return sum(SAID in record.message for record in caplog.records)


# ------------------------------------------------------------------------------------------ towers
@pytest.mark.parametrize("name", TOWERS)
def test_a_texts_mask_is_of_the_text_alone(name, caplog):
    model, inputs = converted(member_model(name)), with_padding(name)
    loss = {"return_loss": True} if "clip" in name or name == "siglip" else {}
    loss = loss or {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    with sc.trace(model) as routing:
        model.train()(**inputs, **loss).loss.backward()
    of_text = [n for n in routing if "text_model" in n or "language_model" in n]
    of_tower = [n for n in routing if "vision" in n or "visual" in n]
    assert of_text and of_tower and {*of_text, *of_tower} == set(routing)
    real = inputs["attention_mask"].bool().reshape(-1)
    wanted = balance(routing, lambda n: real if n in of_text else None)
    coefficient = model.sparsecraft.recipe.stages[0].losses["switch"]
    assert sc.losses.latest(model).item() == pytest.approx(coefficient * wanted, rel=1e-5)
    assert not said(caplog)


def test_words_do_not_mask_patches_where_their_numbers_agree():
    """Four patches and a class token, five words."""
    model = converted(member_model("clip"))
    inputs = dict(member_inputs("clip")) | {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    tower = next(n for n, m in model.named_modules() if getattr(m, "reads", None) == "tower")
    loads = []
    for words in (5, 2):
        inputs["attention_mask"] = (torch.arange(5) < words).long().repeat(2, 1)
        with torch.no_grad(), sc.trace(model) as routing:
            model(**inputs)
        loads.append(routing[tower].load_E(layer_masks(model, inputs, None, routing)(tower)))
    assert torch.equal(*loads)


def test_a_router_by_sequence_of_a_tower_does_not_read_the_texts_mask():
    model = member_model("clip")
    converted(model, sc.recipes.mov(num_experts=3, router="sequence", paths="vision_model.*"))
    inputs = dict(member_inputs("clip")) | {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    found = []
    for words in (5, 2):
        inputs["attention_mask"] = (torch.arange(5) < words).long().repeat(2, 1)
        with torch.no_grad():
            found.append(model(**inputs).image_embeds)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["GitForCausalLM", "ClapModel", "FlavaModel", "SeamlessM4TModel"])
def test_towers_are_known_by_the_inputs_that_they_name(name):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    tower = {"Git": "git.image_encoder", "Cla": "audio_model", "Fla": "image_model"}
    tower = tower.get(name[:3], "speech_encoder")
    text = {"Git": "git.encoder", "Sea": "text_encoder"}.get(name[:3], "text_model")
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert not path.startswith(tower) or reads(model, path) == "tower"
            assert not path.startswith(text) or reads(model, path) == "input"


def test_a_towers_own_mask_counts_or_is_said_not_to(caplog):
    model, inputs = converted(member_model("clip")), with_padding("clip")
    tower = next(n for n, m in model.named_modules() if getattr(m, "reads", None) == "tower")
    with torch.no_grad(), sc.trace(model) as routing:
        model(**inputs)
    real = torch.arange(5).repeat(2, 1) < 3
    found = layer_masks(model, inputs | {"pixel_attention_mask": real}, None, routing)(tower)
    assert torch.equal(found, real.reshape(-1)) and not said(caplog)
    other = {"input_features_mask": torch.zeros(2, 7)}
    assert layer_masks(model, inputs | other, None, routing)(tower) is None
    assert said(caplog) == 1


# ------------------------------------------------------------------------------------------- sound
@pytest.mark.parametrize("name", SOUNDS)
def test_a_mask_of_samples_is_one_of_frames(name, caplog):
    """As the model itself makes it."""
    model, inputs = converted(member_model(name)), with_padding(name)
    with sc.trace(model) as routing:
        model.train()(**inputs, labels=torch.randint(1, 5, (2, 3))).loss.backward()
    frames = len(next(iter(routing.values())).logits_TE) // 2
    real = model._get_feature_vector_attention_mask(frames, inputs["attention_mask"])
    assert 0 < (~real[1]).sum() < frames and real[0].all()
    wanted = balance(routing, lambda n: real.reshape(-1))
    coefficient = model.sparsecraft.recipe.stages[0].losses["switch"]
    assert sc.losses.latest(model).item() == pytest.approx(coefficient * wanted, rel=1e-5)
    assert not said(caplog)


@pytest.mark.parametrize("name", ["wav2vec2_bert", "parakeet_ctc"])
def test_a_mask_of_features_is_one_of_what_is_made_of_them(name, caplog):
    model, inputs = converted(member_model(name)), dict(member_inputs(name))
    inputs["attention_mask"] = torch.ones(inputs["input_features"].shape[:2], dtype=torch.long)
    inputs["attention_mask"][1, -8:] = 0
    with torch.no_grad(), sc.trace(model) as routing:
        model(**inputs)
    masks = layer_masks(model, inputs, None, routing)
    left_out = {(~masks(name)).sum().item() for name in routing}
    assert left_out == {8 if name == "wav2vec2_bert" else 1} and not said(caplog)


def test_an_adapter_behind_an_encoder_changes_no_frames():
    config = copy.deepcopy(member_model("wav2vec2").config)
    config.add_adapter = True
    model = transformers.Wav2Vec2Model(config)
    mask = (torch.arange(400) < torch.tensor([[400], [250]])).long()
    wanted = model._get_feature_vector_attention_mask(23, mask, add_adapter=False)
    assert torch.equal(of_frames(model, mask), wanted)


def test_a_router_by_sequence_reads_the_real_frames():
    model = converted(member_model("wav2vec2"), sc.recipes.mov(num_experts=3, router="sequence"))
    inputs, seen = with_padding("wav2vec2"), {}
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "reads"))
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad(), sc.trace(model) as routing:
        model(**inputs)
    real = model._get_feature_vector_attention_mask(23, inputs["attention_mask"])
    mean = torch.stack([x[keep].mean(0) for x, keep in zip(seen["x"], real, strict=True)])
    wanted = (mean @ layer.router.scorer.weight.T).repeat_interleave(23, dim=0)
    assert torch.allclose(routing[name].logits_TE, wanted, atol=1e-5)


def test_whispers_frames_and_labels_have_masks_of_their_own(caplog):
    model, inputs = converted(member_model("whisper")), dict(member_inputs("whisper"))
    labels, mask = torch.arange(3, 15).reshape(2, 6), torch.ones(2, 64, dtype=torch.long)
    labels[1, 4:], mask[1, 40:] = -100, 0
    del inputs["decoder_input_ids"]
    with sc.trace(model) as routing:
        model.train()(**inputs, attention_mask=mask, labels=labels).loss.backward()
    frames = (torch.arange(32) < torch.tensor([[32], [20]])).reshape(-1)  # at stride 2
    words = (labels != -100).reshape(-1)
    wanted = balance(routing, lambda n: words if "decoder" in n else frames)
    coefficient = model.sparsecraft.recipe.stages[0].losses["switch"]
    assert sc.losses.latest(model).item() == pytest.approx(coefficient * wanted, rel=1e-5)
    assert not said(caplog)


# ------------------------------------------------------------------------- of none of these tokens
def test_layers_that_no_mask_covers_count_all_their_tokens_which_is_said_once(caplog):
    """LED pads a text to its window itself."""
    model = converted(member_model("led"), sc.recipes.upcycling(num_experts=3, paths="*encoder*"))
    ids = torch.arange(3, 15).reshape(2, 6)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    model.train()(**inputs).loss.backward()
    assert not said(caplog)  # nothing is padding
    inputs["attention_mask"][1, 4:] = 0
    for _ in range(2):
        with sc.trace(model) as routing:
            model(**inputs).loss.backward()
        assert said(caplog) == 1
    assert len(next(iter(routing.values())).logits_TE) > ids.numel()
    wanted = balance(routing, lambda n: None)
    coefficient = model.sparsecraft.recipe.stages[0].losses["switch"]
    assert sc.losses.latest(model).item() == pytest.approx(coefficient * wanted, rel=1e-5)


# ----------------------------------------------------------------------- (positions, batch, width)
def xlnet():
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "dropout": 0.0}
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=len(tiny.tokenizer()), pad_token_id=0, **sizes)
    return transformers.XLNetLMHeadModel(config).eval()


def fsmt():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    sizes |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    vocabulary = {"src_vocab_size": 99, "tgt_vocab_size": 99, "langs": ["en", "de"]}
    torch.manual_seed(0)
    config = transformers.FSMTConfig(**sizes, **vocabulary, pad_token_id=0, bos_token_id=1)
    return transformers.FSMTForConditionalGeneration(config).eval()


def led():
    return member_model("led")


def lengths(rows: int) -> torch.Tensor:
    """Of rows of up to eight tokens, so that a square mask is not its own transpose."""
    return 8 - 5 * torch.arange(rows) % 8


def amounts(model, ids, mask) -> tuple[dict, dict[str, torch.Tensor]]:
    """Of one pass the routings, and by layer what each expert received of real tokens."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        # With a cache FSMT of transformers 5.17 decodes the last token alone.
        inputs["use_cache"] = False
    with torch.no_grad(), sc.trace(model) as routing:
        model(**inputs)
    masks = layer_masks(model, inputs, None, routing)
    return routing, {name: found.amounts_E(masks(name)) for name, found in routing.items()}


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("make, turned", [(xlnet, ""), (fsmt, ""), (led, "longformer_self_attn")])
def test_masks_are_in_the_order_of_the_tokens(make, turned, rows):
    """Of eight positions; eight rows are a square, whose shape says nothing."""
    model = converted(make(), sc.recipes.molora(num_experts=3))
    ids = torch.arange(3, 3 + 8 * rows).reshape(rows, 8)
    mask = (torch.arange(8) < lengths(rows)[:, None]).long()
    routing, found = amounts(model, ids, mask)
    assert sum(turned in name for name in routing) >= 4
    for name, routed in routing.items():
        if "_global" in name:  # of other tokens, the few that see all
            continue
        weights_BSE = routed.weights_TE().reshape(8, rows, 3).transpose(0, 1)
        if turned not in name:
            weights_BSE = routed.weights_TE().reshape(rows, 8, 3)
        assert torch.allclose(found[name], weights_BSE[mask.bool()].sum(0)), name


@pytest.mark.parametrize("rows", [2, 8])
def test_padding_counts_nowhere_where_positions_come_first(rows):
    model = converted(xlnet(), sc.recipes.molora(num_experts=3))
    ids = torch.arange(3, 3 + 8 * rows).reshape(rows, 8)
    together = amounts(model, ids, (torch.arange(8) < lengths(rows)[:, None]).long())[1]
    for row, length in zip(ids, lengths(rows).tolist(), strict=True):
        for name, found in amounts(model, row[None, :length], None)[1].items():
            together[name] = together[name] - found
    assert all(rest.abs().max() < 1e-4 for rest in together.values())


def test_orders_are_told_by_the_shape_and_by_the_family_of_a_square():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    flat, turned = [1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]
    for shape, first, wanted in (
        ((2, 3), False, flat), ((2, 1, 3), False, flat), ((6,), False, flat),
        ((3, 2), False, turned), ((3, 2), True, turned), ((6,), True, turned),
        ((2,), False, [1, 1]), ((4, 3), False, None), ((12,), False, None),
    ):  # fmt: skip
        found = of_rows(mask, torch.Size(shape), first)
        assert wanted is None if found is None else found.tolist() == wanted, shape
    square = mask[:, :2]
    assert of_rows(square, square.shape, False).tolist() == [1, 1, 1, 0]
    assert of_rows(square, square.shape, True).tolist() == [1, 1, 1, 0]
    assert of_rows(square.flip(0), square.shape, True).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("options", [{"mixing": "slots"}, {"modalities": True}])
def test_what_looks_at_sequences_is_refused_where_positions_come_first(options):
    with pytest.raises(SurgeryError, match=r"tokens come as \(positions, batch, width\)"):
        sc.convert(xlnet(), sc.recipes.smola(num_experts=3, rank=2, **options))


def test_measured_weights_leave_padding_out_where_positions_come_first():
    from sparsecraft.conversion.merging.frozen import measured_weights

    model = converted(xlnet(), sc.recipes.molora(num_experts=3))
    ids = torch.arange(3, 19).reshape(2, 8)
    mask = (torch.arange(8) < torch.tensor([[8], [3]])).long()
    padded = measured_weights(model, [{"input_ids": ids, "attention_mask": mask}])
    alone = measured_weights(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :3]}])
    for name, found in padded.items():
        assert torch.allclose(found, alone[name], atol=1e-6), name


def test_training_counts_real_tokens_where_positions_come_first(tmp_path):
    """Rows of many lengths, in one batch with padding and one by one."""
    rows = [{"text": "red " * n} for n in (2, 4, 9, 14)]
    data, loads = tiny.write_rows(tmp_path / "rows.jsonl", rows), []
    for size in (4, 1):
        model = converted(xlnet(), sc.recipes.molora(num_experts=3, variant="tuned"))
        sc.train(
            model, data, tmp_path / f"out{size}", tokenizer=tiny.tokenizer(), steps=1,
            batch_size=4, micro_batch=size, max_length=64, packing=False, progress=False,
        )  # fmt: skip
        entry = model.sparsecraft.report["training"][0]["log"][0]
        loads.append({key: value for key, value in entry.items() if key.startswith("max_load/")})
    assert max(loads[0].values()) > 1.1 and loads[0] == pytest.approx(loads[1], rel=1e-5)


def test_rows_are_assigned_to_experts_where_positions_come_first():
    from sparsecraft.training.deal import directed

    model = converted(xlnet(), sc.recipes.molora(num_experts=3))
    ids, experts = torch.arange(3, 19).reshape(2, 8), torch.tensor([[1] * 8, [2] * 8])
    with directed(model), torch.no_grad(), sc.trace(model) as routing:
        model(ids, expert_ids=experts)
    for found in routing.values():
        assert found.indices_TK.reshape(8, 2).tolist() == [[1, 2]] * 8


@pytest.mark.parametrize("make", [xlnet, lambda: member_model("wav2vec2")])
def test_routers_start_from_real_tokens(make):
    from sparsecraft.conversion.domains.inputs import read_inputs
    from sparsecraft.surgery.plan import plan

    model, taken = make(), []
    name, size, kept = ("input_ids", 8, 3) if make is xlnet else ("input_values", 400, 100)
    values = torch.arange(3, 19).reshape(2, 8) if make is xlnet else torch.randn(2, 400)
    mask = (torch.arange(size) < torch.tensor([[size], [kept]])).long()
    items = plan(model, sc.recipes.molora(num_experts=3))[:2]
    read_inputs(model, items, [{name: values, "attention_mask": mask}], taken.append)
    padded = taken.pop()
    if make is xlnet:
        rows = [{name: values[:1]}, {name: values[1:, :kept]}]
        read_inputs(model, items, rows, taken.append)
        for found, *alone in zip(padded, *taken, strict=True):
            assert found.sum(0).allclose(torch.cat(alone).sum(0), atol=1e-4)
    else:
        real = model._get_feature_vector_attention_mask(23, mask)
        assert {len(found) for found in padded} == {real.sum().item()}
