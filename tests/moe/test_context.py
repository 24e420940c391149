"""What layers learn of a batch: routers by sequence, slots, modalities, and `sc.context`.

Shapes: B sequences, S positions, E experts, I input features, O output features.
"""

from __future__ import annotations

import copy
import io
from contextlib import contextmanager

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.errors import SparsecraftError, SurgeryError
from sparsecraft.moe.batch import Batch
from tests import cases

ENCODERS = pytest.mark.parametrize("family", ["bert", "t5"])
CAUSAL = pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
IDS = torch.arange(3, 27).reshape(2, 12)
SHORT, PREFIX = 7, 5
PADDING = (torch.arange(12) < torch.tensor([[12], [SHORT]])).long()
VISUAL = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0]] * 2)


def converted(family: str, recipe: sc.Recipe):
    """In float64, with random new parameters: what differs by more than rounding is wrong."""
    model = cases.dense(family).double()
    sc.convert(model, recipe)
    cases.randomize_new(model, std=0.3)
    return model


def encoder_recipe(family: str, make, **options) -> sc.Recipe:
    return make(num_experts=3, paths="encoder.*" if family == "t5" else "*", **options)


def slots(**options) -> sc.Recipe:
    return sc.recipes.smola(num_experts=3, rank=2, mixing="slots", **options)


def logits(model, ids: torch.Tensor, **more) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@contextmanager
def watched(model):
    """Layer -> its latest input and output."""
    seen, handles = {}, []
    for layer in model.sparsecraft.layers:

        def keep(module, args, output):
            seen[module] = args[0].detach(), output.detach()

        handles.append(layer.register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


def prefix_of(ids: torch.Tensor, length: int = PREFIX) -> torch.Tensor:
    return (torch.arange(ids.shape[1]) < length).long().expand(ids.shape)


# ---------------------------------------------------------------------------- routers by sequence
@ENCODERS
@pytest.mark.parametrize("recipe", ["mov", "smola"])
def test_padding_changes_nothing(family, recipe):
    if recipe == "mov":
        options = {"make": sc.recipes.mov, "router": "sequence"}
    else:
        options = {"make": sc.recipes.smola, "mixing": "slots"}
    model = converted(family, encoder_recipe(family, **options))
    padded = logits(model, IDS.masked_fill(PADDING == 0, 0), attention_mask=PADDING)
    other = logits(model, IDS.masked_fill(PADDING == 0, 9), attention_mask=PADDING)
    alone = logits(model, IDS[1:, :SHORT])[0]
    for found in (padded[1], other[1]):
        assert torch.allclose(found[: len(alone)], alone, atol=1e-6)  # T5's norm is float32
    unmasked = logits(model, IDS.masked_fill(PADDING == 0, 9))[1]
    assert (unmasked[: len(alone)] - alone).abs().max() > 1e-3


def test_a_sequence_is_routed_by_the_mean_of_its_real_tokens():
    model = converted("bert", sc.recipes.mov(num_experts=3, router="sequence"))
    with watched(model) as seen, sc.trace(model) as routing:
        logits(model, IDS, attention_mask=PADDING)
    for name, found in routing.items():
        layer = model.get_submodule(name)
        x_BSI, weight_EI = seen[layer][0], layer.router.scorer.weight
        for b, length in enumerate((12, SHORT)):
            expected_E = weight_EI @ x_BSI[b, :length].mean(0)
            for logits_E in found.logits_TE.reshape(2, 12, 3)[b]:
                assert torch.allclose(logits_E, expected_E, atol=1e-9)


def test_one_real_token_decides_for_its_sequence():
    model, mask = converted("bert", sc.recipes.mov(3, router="sequence")), torch.zeros(2, 3).long()
    mask[:, 0] = 1
    padded = logits(model, IDS[:, :3], attention_mask=mask)
    assert torch.allclose(padded[:, :1], logits(model, IDS[:, :1]), atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_decoders_refuse_a_router_by_sequence(family):
    model = cases.dense(family)
    with pytest.raises(SurgeryError, match=r"would show a token what comes after it; use decides"):
        sc.convert(model, sc.recipes.mov(router="sequence"))
    assert not hasattr(model, "sparsecraft")


# -------------------------------------------------------------------------------------- the slots
def soft_moe(layer, x_BSI: torch.Tensor, mixed_BS: torch.Tensor, alone_BS: torch.Tensor):
    """The layer's output by Soft MoE's formula on the mixed tokens (Puigcerver et al. 2024, Eq. 1
    to 3), Y = C f(D^T X), and by the mixture for each token on those that stay alone."""
    phi_IE, bank = layer.router.scorer.weight.T, layer.experts
    y_BSO = layer.base(x_BSI)
    for b in range(len(x_BSI)):
        mixed, alone = mixed_BS[b].bool(), alone_BS[b].bool()
        scores_SE = x_BSI[b, mixed] @ phi_IE
        dispatch_SE, combine_SE = scores_SE.softmax(0), scores_SE.softmax(1)
        slots_EI = dispatch_SE.T @ x_BSI[b, mixed]
        expert = [bank.scale * bank.lora_B[e] @ bank.lora_A[e] for e in range(len(slots_EI))]
        out_EO = torch.stack([m @ x for m, x in zip(expert, slots_EI, strict=True)])
        y_BSO[b, mixed] += combine_SE @ out_EO
        for s in alone.nonzero().flatten():
            weights_E = (x_BSI[b, s] @ phi_IE).softmax(0)
            y_BSO[b, s] += sum(w * m @ x_BSI[b, s] for w, m in zip(weights_E, expert, strict=True))
    return y_BSO


@ENCODERS
def test_slots_in_an_encoder_are_soft_moe(family):
    model = converted(family, encoder_recipe(family, sc.recipes.smola, mixing="slots"))
    with watched(model) as seen, torch.no_grad():
        logits(model, IDS, attention_mask=PADDING)
        assert len(seen) >= 10
        for layer, (x_BSI, y_BSO) in seen.items():
            expected = soft_moe(layer, x_BSI, PADDING, torch.zeros_like(PADDING))
            kept = PADDING.bool()
            assert torch.allclose(y_BSO[kept], expected[kept], atol=1e-9)


def test_slots_mix_a_causal_models_prefix_and_leave_the_rest_alone():
    model, prefix = converted("llama", slots()), prefix_of(IDS)
    with watched(model) as seen, torch.no_grad():
        logits(model, IDS, prefix_mask=prefix)
        for layer, (x_BSI, y_BSO) in seen.items():
            expected = soft_moe(layer, x_BSI, prefix, 1 - prefix)
            assert torch.allclose(y_BSO, expected, atol=1e-9)


@CAUSAL
def test_slots_without_a_prefix_are_the_mixture_by_token(family):
    by_token = sc.recipes.smola(num_experts=3, rank=2, mixing="token")
    found = logits(converted(family, slots()), IDS)
    assert torch.allclose(found, logits(converted(family, by_token), IDS), atol=1e-9)


@CAUSAL
def test_slots_keep_a_causal_model_causal(family):
    model = converted(family, slots())
    for given in ({}, {"prefix_mask": prefix_of(IDS)}):
        before = logits(model, IDS, **given)
        for changed in range(PREFIX if given else 0, 12):
            ids = IDS.clone()
            ids[:, changed] = 50
            after = logits(model, ids, **given)
            assert torch.allclose(after[:, :changed], before[:, :changed], atol=1e-9)
            assert (after[:, changed] - before[:, changed]).abs().max() > 1e-4
    ids = IDS.clone()
    ids[:, PREFIX - 1] = 50  # the last token of the prefix is seen by its first
    after = logits(model, ids, prefix_mask=prefix_of(IDS))
    assert (after[:, 0] - before[:, 0]).abs().max() > 1e-4


@CAUSAL
@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_cached_steps_equal_one_pass(family, prefix):
    model, start = converted(family, slots()), 8
    given = {"prefix_mask": prefix_of(IDS, prefix)} if prefix else {}
    whole = logits(model, IDS, **given)
    first = {name: mask[:, :start] for name, mask in given.items()}
    with torch.no_grad():
        out = model(IDS[:, :start], use_cache=True, **first)
        steps = [out.logits]
        for at in range(start, 12):
            out = model(IDS[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_held_prefix_serves_beams_and_generation_without_a_cache(beams):
    model, found = converted("llama", slots()), {}
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "output_logits": True}
    for length in (0, PREFIX):
        with sc.context(model, prefix_mask=prefix_of(IDS, length)):
            for cache in (True, False):
                found[length, cache] = model.generate(
                    IDS, attention_mask=torch.ones_like(IDS), use_cache=cache,
                    return_dict_in_generate=True, **options,
                )  # fmt: skip
        cached, plain = found[length, True], found[length, False]
        assert torch.equal(cached.sequences, plain.sequences)
        for ours, theirs in zip(cached.logits, plain.logits, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
    assert (found[0, True].logits[0] - found[PREFIX, True].logits[0]).abs().max() > 1e-4
    expected = logits(model, IDS, prefix_mask=prefix_of(IDS))[:, -1]
    assert torch.allclose(found[PREFIX, True].logits[0][::beams], expected.float(), atol=1e-6)


# ------------------------------------------------------------------------------------- modalities
def by_modality(model, modality: str | None) -> list:
    return [layer for layer in model.sparsecraft.layers if layer.modality == modality]


@pytest.mark.parametrize("mixing", ["token", "slots"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_set_acts_on_its_own_tokens_only(family, mixing):
    recipe = sc.recipes.smola(num_experts=3, rank=2, mixing=mixing, modalities=True)
    model = converted(family, recipe)
    own = {None: VISUAL >= 0, "text": VISUAL == 0, "visual": VISUAL == 1}
    # Held, for the sets inside of another one's base, which are called by themselves below.
    with sc.context(model, mm_token_type_ids=VISUAL), watched(model) as seen, torch.no_grad():
        logits(model, IDS)
        for modality, mask in own.items():
            for layer in by_modality(model, modality):
                x_BSI, y_BSO = seen[layer]
                none, mask_BS = torch.zeros_like(mask), mask.expand(2, 12)
                mixes = mixing == "slots" and family == "bert"
                expected = soft_moe(layer, x_BSI, *((mask_BS, none) if mixes else (none, mask_BS)))
                assert torch.allclose(y_BSO, expected, atol=1e-9)
                assert torch.equal(y_BSO[~mask_BS], layer.base(x_BSI)[~mask_BS])


@pytest.mark.parametrize("mixing", ["token", "slots"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_set_learns_from_its_own_tokens_only(family, mixing):
    recipe = sc.recipes.smola(num_experts=3, rank=2, mixing=mixing, modalities=True)
    model = converted(family, recipe)
    for kinds, still in ((None, "visual"), (torch.ones_like(IDS), "text")):
        model.zero_grad()
        model(
            IDS, **({} if kinds is None else {"mm_token_type_ids": kinds})
        ).logits.sin().sum().backward()
        for modality in (None, "text", "visual"):
            moved = [
                layer.experts.lora_B.grad.abs().max() > 0 for layer in by_modality(model, modality)
            ]
            assert not any(moved) if modality == still else all(moved), modality


# ------------------------------------------------------------------------- masks and their tokens
def by_kind(family: str):
    recipe = sc.recipes.smola(num_experts=3, rank=2, modalities=True)
    return converted(family, recipe)


@pytest.mark.parametrize("field", ["mm_token_type_ids", "prefix_mask"])
def test_a_decoder_beside_an_encoder_has_none_of_its_masks(field):
    """Of equal length or not: its tokens are text and in no prefix."""
    model = by_kind("t5") if field == "mm_token_type_ids" else converted("t5", slots())
    mask = {field: VISUAL}
    wanted = None
    for length in (11, 12, 13):
        ids = torch.arange(40, 40 + 2 * length).reshape(length, 2).T
        with torch.no_grad():
            found = model(input_ids=IDS, decoder_input_ids=ids, **mask).logits[:, :11]
        wanted = found if wanted is None else wanted
        assert torch.allclose(found, wanted, atol=1e-6)
    without = model(input_ids=IDS, decoder_input_ids=ids).logits[:, :11]
    assert (without - wanted).abs().max() > 1e-4


def test_what_reads_the_encoder_from_a_decoder_has_its_masks():
    model = by_kind("t5")
    ids = IDS.flip(0)
    with watched(model) as seen, torch.no_grad():
        model(input_ids=IDS, decoder_input_ids=ids, mm_token_type_ids=VISUAL)
        counts = dict.fromkeys(("encoder", "cross", "decoder"), 0)
        for name, layer in model.named_modules():
            if getattr(layer, "modality", None) == "visual":
                x_BSI, y_BSO = seen[layer]
                moved = (y_BSO != layer.base(x_BSI)).any(-1)
                cross = "EncDecAttention.k" in name or "EncDecAttention.v" in name
                kind = "cross" if cross else name.split(".")[0]
                counts[kind] += 1
                assert torch.equal(moved, VISUAL.bool() & (kind != "decoder")), name
    assert counts == {"encoder": 12, "cross": 4, "decoder": 16}


def generated(model, **options) -> list[torch.Tensor]:
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True} | options
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_held_modalities_serve_beams_and_generation_without_a_cache(family, beams):
    model = by_kind(family)
    with sc.context(model, mm_token_type_ids=VISUAL):
        cached, plain = (generated(model, num_beams=beams, use_cache=c) for c in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, theirs in zip(cached.logits, plain.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    decoder = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if family == "t5" else {}
    with torch.no_grad():
        first = model(IDS, mm_token_type_ids=VISUAL, **decoder).logits[:, -1].float()
    assert torch.allclose(cached.logits[0][::beams], first, atol=1e-5)
    assert (generated(model, num_beams=beams).logits[0] - cached.logits[0]).abs().max() > 1e-4
    if beams == 1:  # every token that was added is text
        ids, kinds = cached.sequences, VISUAL
        if family == "t5":
            decoder["decoder_input_ids"] = ids[:, :-1]
        else:
            kinds = torch.nn.functional.pad(VISUAL, (0, 6))
        inputs = IDS if family == "t5" else ids
        with torch.no_grad():
            whole = model(inputs, mm_token_type_ids=kinds, **decoder).logits.float()
        last = whole[:, -1] if family == "t5" else whole[:, -2]
        assert torch.allclose(cached.logits[-1], last, atol=1e-5)


@pytest.mark.parametrize("given", ["held", "prompt", "step"])
def test_a_cached_step_takes_the_prompts_mask_or_its_own(given):
    model, start = by_kind("llama"), 8
    whole_mask = VISUAL.clone()
    if given != "step":
        whole_mask[:, start:] = 0
    whole = logits(model, IDS, mm_token_type_ids=whole_mask)
    prompt = {"mm_token_type_ids": whole_mask[:, :start]}
    found, cache = [], None
    for at, end in ((0, start), (start, start + 1), (start + 1, 12)):
        step = {"held": {}, "prompt": prompt}.get(given)
        if step is None:
            step = {"mm_token_type_ids": whole_mask[:, at:end]}
        with sc.context(model, **(prompt if given == "held" else {})), torch.no_grad():
            out = model(IDS[:, at:end], past_key_values=cache, use_cache=True, **step)
        cache = out.past_key_values
        found.append(out.logits)
    assert torch.allclose(torch.cat(found, dim=1), whole, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 11), (2, 13), (1, 12), (3, 12), (24,), (2, 1, 12)])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_mask_that_does_not_fit_is_refused(family, shape):
    wrong = torch.ones(shape, dtype=torch.long)
    refusing = [(by_kind(family), "mm_token_type_ids")]
    if family != "bert":  # whose slots read attention_mask, which its attention refuses first
        refusing.append((converted(family, slots()), "prefix_mask"))
    for model, field in refusing:
        right = logits(model, IDS)
        with pytest.raises(SparsecraftError) as refusal:
            logits(model, IDS, **{field: wrong})
        said = f"{field} has shape {shape} and the tokens that it covers have (2, 12); pass one"
        assert said in str(refusal.value)
        assert torch.equal(logits(model, IDS), right)


@pytest.mark.parametrize(
    "family, shape", [("llama", (2, 13)), ("llama", (4, 12)), ("bert", (2, 11)), ("t5", (2, 11))]
)
def test_a_held_mask_that_does_not_fit_is_refused(family, shape):
    """Only in a decoder alone may a call have more tokens than the prompt."""
    model = by_kind(family)
    said = rf"context holds mm_token_type_ids of shape \({shape[0]}, {shape[1]}\), and the tokens"
    held = sc.context(model, mm_token_type_ids=torch.ones(shape, dtype=torch.long))
    with held, pytest.raises(SparsecraftError, match=said):
        logits(model, IDS)


def test_an_encoder_alone_forgets_the_masks_of_the_call_before():
    """Generation calls the encoder itself, with another prompt than the latest training step."""
    model = by_kind("t5")
    before = generated(model)
    logits(model, IDS[:, :7], mm_token_type_ids=VISUAL[:, :7])
    logits(model, IDS, mm_token_type_ids=VISUAL)
    with pytest.raises(SparsecraftError):  # and one that broke off
        logits(model, IDS, mm_token_type_ids=VISUAL[:, :7])
    for ours, theirs in zip(generated(model).logits, before.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_an_image_tower_has_no_text_and_refuses_modalities():
    model = llava()
    recipe = sc.recipes.smola(num_experts=3, rank=2, modalities=True)
    said = r"reads images or sound alone.*give paths without it, such as '\*language_model\*'"
    with pytest.raises(SurgeryError, match=rf"'model\.vision_tower.*{said}"):
        sc.convert(model, recipe)
    recipe = sc.recipes.smola(num_experts=3, rank=2, modalities=True, paths="*language_model*")
    sc.convert(model, recipe)
    assert {layer.reads for layer in model.sparsecraft.layers} == {"input"}
    model = llava()
    sc.convert(model, slots())
    reads = [layer.reads for layer in model.sparsecraft.layers]
    assert set(reads) == {"input", "tower"}
    cases.randomize_new(model, std=0.3)
    # As many tokens as the tower has, four patches and one for the class, are no reason to mix.
    ids, pixels = torch.tensor([[59, 59, 59, 59, 6]]), torch.ones(1, 3, 8, 8)
    found = []
    for prefix in ({}, {"prefix_mask": torch.ones_like(ids)}):
        with watched(model) as seen, torch.no_grad():
            model(input_ids=ids, pixel_values=pixels, **prefix)
        found.append(seen)
    assert all(seen[tower][0].shape[1] == 5 for tower in seen if tower.reads == "tower")
    for layer in found[0]:
        same = torch.equal(found[0][layer][1], found[1][layer][1])
        assert same == (layer.reads == "tower")


def llava():
    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, **heads, num_key_value_heads=2),
        vision_config=transformers.CLIPVisionConfig(**vision, **heads, image_size=8, patch_size=4),
        image_token_id=59,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


# ---------------------------------------------------------------------------------------- context
def test_a_context_holds_its_values_and_gives_them_back():
    model = converted("llama", slots())
    batches = model.sparsecraft.layers[0].batches
    plain, mixed = logits(model, IDS), logits(model, IDS, prefix_mask=prefix_of(IDS))
    with sc.context(model, prefix_mask=prefix_of(IDS)):
        for _ in range(2):
            assert torch.equal(logits(model, IDS), mixed)
        with sc.context(model, prefix_mask=prefix_of(IDS, 3)):
            inner = logits(model, IDS)
        assert torch.equal(logits(model, IDS), mixed) and not torch.equal(inner, mixed)
        # What a call brings along comes first.
        assert torch.equal(logits(model, IDS, prefix_mask=prefix_of(IDS, 3)), inner)
    assert torch.equal(logits(model, IDS), plain)
    with pytest.raises(ZeroDivisionError), sc.context(model, prefix_mask=prefix_of(IDS)):
        _ = 1 / 0
    assert batches.new().held == {} and torch.equal(logits(model, IDS), plain)


def test_a_context_refuses_what_no_layer_asks_for():
    slotted = sc.context(converted("llama", slots()), prefix_masks=prefix_of(IDS))
    with pytest.raises(SparsecraftError, match=r"no field 'prefix_masks'.*Did you mean"), slotted:
        pass
    for model in (cases.dense("llama"), converted("llama", sc.recipes.mov(num_experts=3))):
        useless, said = sc.context(model, prefix_mask=prefix_of(IDS)), "No layer of this Llama"
        with pytest.raises(SparsecraftError, match=said), useless:
            pass


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_trunk_that_is_called_without_its_head_hears_of_the_batch(family):
    model = converted(family, encoder_recipe(family, sc.recipes.smola, mixing="slots"))
    trunk = model.get_encoder() if family == "t5" else model.base_model
    given = {"prefix_mask": prefix_of(IDS)} if family == "llama" else {"attention_mask": PADDING}
    with watched(model) as whole:
        logits(model, IDS, **given)
    with watched(model) as seen, torch.no_grad():
        logits(model, IDS)  # which it has nothing from
        trunk(IDS, **given)
    assert seen and all(torch.equal(seen[layer][1], whole[layer][1]) for layer in seen)
    with watched(model) as plain, torch.no_grad():
        trunk(IDS)
    assert not torch.equal([*plain.values()][-1][1], [*seen.values()][-1][1])


def test_a_pass_that_breaks_off_leaves_nothing_behind():
    """Also where Ctrl-C ends it, which no hook hears of."""
    model, prefix = converted("llama", slots()), prefix_of(IDS)
    plain, inner = logits(model, IDS), logits(model, IDS, prefix_mask=prefix_of(IDS, 3))

    def breaks(*args):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(breaks)
    with pytest.raises(KeyboardInterrupt), sc.context(model, prefix_mask=prefix):
        logits(model, IDS)
    handle.remove()
    with sc.context(model, prefix_mask=prefix_of(IDS, 3)), torch.no_grad():
        assert torch.equal(model.lm_head(model.model(IDS).last_hidden_state), inner)
    assert torch.equal(logits(model, IDS), plain)


@pytest.mark.parametrize("recipe", [slots, lambda: sc.recipes.bam(2)])
def test_models_are_pickled(recipe):
    model, file = converted("llama", recipe()), io.BytesIO()
    wanted = logits(model, IDS)
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), IDS), wanted)


def test_a_copy_of_a_model_has_a_batch_of_its_own():
    model = converted("llama", slots())
    clone = copy.deepcopy(model)
    batches = [{id(layer.batches) for layer in m.sparsecraft.layers} for m in (model, clone)]
    assert len(batches[0]) == len(batches[1]) == 1 and batches[0] != batches[1]
    mixed = logits(clone, IDS, prefix_mask=prefix_of(IDS))
    with sc.context(model, prefix_mask=prefix_of(IDS)):
        assert torch.equal(logits(model, IDS), mixed)
        assert torch.equal(logits(clone, IDS), logits(converted("llama", slots()), IDS))
    sc.revert(clone)
    assert not clone._forward_pre_hooks and model._forward_pre_hooks
    assert torch.equal(logits(clone, IDS), logits(cases.dense("llama").double(), IDS))
    assert torch.equal(logits(model, IDS, prefix_mask=prefix_of(IDS)), mixed)


def test_tokens_without_a_sequence_are_refused():
    with pytest.raises(SparsecraftError, match=r"needs tokens of shape .* got \(6, 4\)"):
        Batch().sequences(torch.zeros(6, 4))
    flat = Batch(shape=torch.Size((2, 3)))
    assert flat.sequences(torch.zeros(6, 4)).shape == (2, 3, 4)


# ------------------------------------------------------------------ activation checkpointing

CHECKPOINTED = {
    "modalities": (lambda: sc.recipes.smola(3, 2, modalities=True), "mm_token_type_ids"),
    "slots": (lambda: sc.recipes.smola(3, 2, mixing="slots"), "prefix_mask"),
}


def checkpointed(recipe: str, reentrant: bool):
    model = cases.dense("llama")
    sc.convert(model, CHECKPOINTED[recipe][0]())
    cases.randomize_new(model, 0.5)
    model.train()
    kwargs = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", CHECKPOINTED)
def test_recomputation_sees_the_batch_of_its_forward_pass_or_refuses(recipe, reentrant):
    ids = torch.arange(3, 27).reshape(2, 12)
    mask = (torch.arange(12) < 5).long().expand(2, 12)
    field = CHECKPOINTED[recipe][1]

    def gradient(model, held: bool) -> torch.Tensor:
        model.zero_grad()
        if held:  # the context may end before the backward pass
            with sc.context(model, **{field: mask}):
                loss = model(ids, labels=ids).loss
        else:
            loss = model(ids, labels=ids, **{field: mask}).loss
        loss.backward()
        return model.model.layers[0].mlp.up_proj.experts.lora_A.grad.clone()

    model = checkpointed(recipe, reentrant)
    found = [gradient(model, held) for held in (False, True, False)]
    model.gradient_checkpointing_disable()
    wanted = gradient(model, False)
    assert wanted.abs().max() > 0
    assert all(torch.allclose(g, wanted, atol=1e-6) for g in found)

    model = checkpointed(recipe, reentrant)
    losses = [model(ids, labels=ids, **{field: m}).loss for m in (mask, 1 - mask)]
    with pytest.raises(SparsecraftError, match="goes through several forward passes"):
        sum(losses).backward()
    gradient(model, False)  # and it goes on


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", CHECKPOINTED)
def test_recomputation_sees_its_own_batch_whatever_ran_since(recipe, reentrant):
    ids = torch.arange(3, 27).reshape(2, 12)
    masks = [(torch.arange(12) < length).long().expand(2, 12) for length in (5, 9)]
    field = CHECKPOINTED[recipe][1]

    def gradients(model, together: bool) -> list[torch.Tensor]:
        found, passes = [], []
        for mask in masks:
            out = model(ids, output_hidden_states=True, **{field: mask})
            passes.append(out.hidden_states[-1].pow(2).sum())
            if not together:
                found += backward(model, passes.pop())
        with torch.no_grad():
            model(ids)
        return found + [g for loss in passes for g in backward(model, loss)]

    def backward(model, loss: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return [model.model.layers[0].mlp.up_proj.experts.lora_A.grad.clone()]

    model = checkpointed(recipe, reentrant)
    found = [gradients(model, together) for together in (False, True)]
    model.gradient_checkpointing_disable()
    wanted = gradients(model, False)
    assert not torch.allclose(*wanted)
    for grads in found:
        for ours, theirs in zip(grads, wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
