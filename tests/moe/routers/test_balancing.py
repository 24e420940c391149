"""Capacity, bias on the choice, ReLU routing, adaptive coefficients.

T tokens, K slots, E experts, D width.
"""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import sparsecraft as sc
from sparsecraft.conversion.extension.remove import remove
from sparsecraft.errors import CheckpointError, ExportError, RecipeError
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.losses import auxiliary_loss, relu_balance, router_z, switch_balance
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.routers.capacity import limited, room
from sparsecraft.moe.routers.moving import Seen
from sparsecraft.moe.routers.router import Router
from sparsecraft.moe.routing import BALANCE_LOSSES, Routing
from sparsecraft.recipe.balancing import Bias, ByDropRate, BySparsity, Capacity
from sparsecraft.recipe.routers import GateSpec, RouterSpec
from sparsecraft.recipe.selections import ReLU, TopK
from sparsecraft.training import trainers
from tests import tiny
from tests.cases import batch, dense
from tests.cases.families import randomize_new
from tests.tiny import chat_rows, tokenizer, write_rows

T, E, D, K = 37, 5, 16, 2
HALF = Capacity(factor=0.5)


def routed(select, rows: int = T) -> tuple:
    torch.manual_seed(0)
    router = build_router(RouterSpec(select=select), D, E)
    return router, router(torch.randn(rows, D))


def upcycled(changes: dict, family: str = "llama", recipe: sc.Recipe | None = None):
    """A converted model of random numbers; `tiny` is one that the tests' tokenizer fits."""
    recipe = sc.override(recipe or sc.recipes.upcycling(4, 2), changes)
    model = tiny.llama() if family == "tiny" else dense(family)
    sc.convert(model, recipe)
    randomize_new(model, std=0.3)
    return model.train()


# ------------------------------------------------------------------------------------- capacity


def by_hand(routing: Routing, factor: float, real: list[bool], best: bool) -> list[list[bool]]:
    """Which slots are kept, one after the other."""
    tokens, room = sum(real), math.ceil(round(factor * K * sum(real) / E, 9))
    order = [(t, k) for t in range(len(real)) for k in range(K)]
    if best:
        order.sort(key=lambda at: -routing.weights_TK[at].item())
    taken, kept = [0] * E, [[True] * K for _ in real]
    for t, k in order:
        e = routing.indices_TK[t, k].item()
        if real[t]:
            kept[t][k] = taken[e] < room
            taken[e] += kept[t][k]
    assert tokens == 0 or max(taken) <= room
    return kept


@pytest.mark.parametrize("kind", ["first", "best"])
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 3.0])
@pytest.mark.parametrize("padded", [0, 9, T])
def test_slots_beyond_the_capacity_are_dropped(kind, factor, padded):
    _, routing = routed(TopK(K))
    real = torch.arange(T) >= padded
    capacity = Capacity(kind=kind, factor=factor)
    found = limited(routing, capacity, real if padded else None)
    kept_TK = torch.tensor(by_hand(routing, factor, real.tolist(), kind == "best"))
    assert torch.equal(found.indices_TK, routing.indices_TK.where(kept_TK, E))
    assert torch.equal(found.weights_TK, routing.weights_TK * kept_TK)
    assert torch.equal(found.amounts_E(real), routing.amounts_E(real)), "of the choice"
    if factor == 3.0 or padded == T:
        assert kept_TK.all()
    if factor <= 0.5 and padded < T:
        assert not kept_TK.all()


def test_capacities_sum_to_the_factor_times_all_slots():
    shares_E = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)
    rooms_E = room(Capacity(factor=1.1), 1000 * K, shares_E)
    assert rooms_E.tolist() == [660, 660, 440, 220, 220] and rooms_E.sum() == 1.1 * K * 1000


def test_a_token_keeps_its_place_whatever_comes_later():
    _, routing = routed(TopK(K))
    part = Routing(routing.weights_TK[:20], routing.indices_TK[:20], routing.logits_TE[:20])
    whole = limited(routing, Capacity(factor=0.5 * 20 / T))
    found = limited(part, Capacity(factor=0.5))
    assert torch.equal(found.indices_TK, whole.indices_TK[:20])


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_padding_takes_no_room(family):
    """In training the loss and gradients of a padded batch are those of it without its padding."""
    changes = {"router.select.capacity": Capacity(factor=0.6), "stages.0.losses": {}}
    model = upcycled(changes, family)
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    ids = batch(family)["input_ids"][:1, :8]
    labels = ids.clone()
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    side = (0, 4)
    padded = {
        "input_ids": torch.nn.functional.pad(ids, side, value=1),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), side),
        "labels": torch.nn.functional.pad(labels, side, value=-100),
    }
    losses = []
    for inputs in (plain, padded):
        with sc.trace(model) as routing:
            losses.append(model(**inputs).loss)
        found = next(iter(routing.values()))
        assert (found.indices_TK[:8] == 4).any(), "something is dropped"
    assert torch.allclose(*losses, atol=1e-6)


def test_nothing_is_dropped_at_inference():
    model = upcycled({"router.select.capacity": Capacity(factor=0.3)}).eval()
    plain = upcycled({}).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(**batch("llama")).logits, plain(**batch("llama")).logits)


def test_padding_of_packed_rows_takes_no_room(tmp_path):
    """Packed, the model is given no mask, and the trainer knows what is padding."""
    seen, limit = [], Router.limited

    def noted(self, routing, mask_T, passes):
        seen.append(mask_T)
        return limit(self, routing, mask_T, passes)

    model = upcycled({"router.select.capacity": HALF}, "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "limited", noted)
        train(model, tmp_path, steps=2, packing=True)
    masks = [mask_T for mask_T in seen if mask_T is not None]
    assert len(masks) == len(seen) and any(not mask_T.all() for mask_T in masks)


@pytest.mark.parametrize("place", ["replace", "after", "beside", "inside", "vectors"])
def test_every_way_drops_alike(place):
    recipe = {
        "replace": sc.recipes.upcycling(4, 2),
        "after": sc.recipes.camelidae(4, 2, adapter_dim=4, lora_rank=0, dropout=0.0),
        "beside": sc.recipes.molora(4, rank=2, top_k=2, dropout=0.0),
        "inside": sc.recipes.mixlora(4, 2, rank=2, dropout=0.0),
        "vectors": sc.recipes.mov(4, top_k=2),
    }[place]
    number = next(n for n, e in enumerate(recipe.edits) if e.router)
    changes = {f"edits.{number}.router.select.capacity": Capacity(factor=0.5)}
    model = upcycled(changes, recipe=recipe).double()
    outputs = []
    for dispatch in ("loop", "auto"):
        set_dispatch(model, dispatch)
        outputs.append(model(**batch("llama")).logits)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-9


@pytest.mark.parametrize("place", ["after", "vectors"])
def test_what_finds_no_room_passes_where_experts_change_tokens(place):
    recipe = {
        "after": sc.recipes.camelidae(4, 2, adapter_dim=4, lora_rank=0, dropout=0.0),
        "vectors": sc.recipes.mov(4, top_k=2),
    }[place]
    number = next(n for n, e in enumerate(recipe.edits) if e.router)
    changes = {f"edits.{number}.router.select.capacity": Capacity(factor=1e-6)}
    model = upcycled(changes, recipe=recipe)
    layer = next(m for m in model.modules() if isinstance(m, sc.MoELayer))
    x_BSD = torch.randn(1, 30, 32)
    dropped = (layer(x_BSD) - layer.base(x_BSD)).flatten(0, 1).abs().amax(-1)
    assert (dropped == 0).sum() >= 20, "one slot of each expert is all that there is room for"


def test_a_log_line_says_how_much_is_dropped(tmp_path):
    model = upcycled({"router.select.capacity": HALF}, "tiny")
    log = train(model, tmp_path, steps=1)
    line = next(entry for entry in log if "dropped" in entry)
    assert 0.3 < line["dropped"] < 1


# ------------------------------------------------------------------------------------ the bias


def test_the_bias_moves_the_choice_and_not_the_weights():
    router, _ = routed(TopK(K, balance=Bias(rate=0.25)))
    assert (router.balance.values_E == 0).all()
    bias_E = torch.zeros(E)
    for _ in range(3):  # algorithm 1 of the paper
        x_TD = torch.randn(T, D)
        routing = router(x_TD)
        scores_TE = (x_TD @ router.scorer.weight.T).softmax(-1)
        load = [0] * E
        for t in range(T):
            order = sorted(range(E), key=lambda e: -(scores_TE[t, e] + bias_E[e]).item())[:K]
            assert sorted(order) == sorted(routing.indices_TK[t].tolist())
            total = sum(scores_TE[t, e] for e in order)
            weights = routing.weights_TE()[t]
            for e in order:
                assert torch.allclose(weights[e], scores_TE[t, e] / total, atol=1e-6)
                load[e] += 1
        seen = Seen.of(routing, None)
        router.balance.move(seen, [seen])
        for e in range(E):
            error = sum(load) / E - load[e]
            bias_E[e] += 0.25 * ((error > 0) - (error < 0))
        assert torch.equal(router.balance.values_E, bias_E)


def test_a_bias_evens_out_the_loads_of_a_training(tmp_path):
    uneven = {}
    for name, changes in {
        "with": {"router.select.balance": Bias(rate=0.03)},
        "without": {},
    }.items():
        recipe = sc.recipes.upcycling(4, 1, balance_coef=0)
        model = upcycled(changes, "tiny", recipe)
        with torch.no_grad():
            for layer in model.sparsecraft.layers:
                layer.router.scorer.weight.normal_(std=0.05)
        log = train(model, tmp_path / name, steps=24)
        uneven[name] = [line["load_entropy"] for line in log if "load_entropy" in line]
        if changes:
            biases = [layer.router.balance.values_E for layer in model.sparsecraft.layers]
            assert all(0 < b.abs().max() <= 24 * 0.03 + 1e-6 for b in biases)
    assert uneven["with"][0] == pytest.approx(uneven["without"][0], abs=1e-6)
    assert uneven["with"][-1] > uneven["without"][-1] + 0.05


# -------------------------------------------------------------------------------------- ReMoE


def test_relu_routing_is_remoes():
    router, routing = routed(ReLU(k=2))
    x_TD = torch.randn(T, D)
    routing = router(x_TD)
    weights_TE = routing.weights_TE()
    f, r = [0.0] * E, [0.0] * E
    for t in range(T):
        for e in range(E):
            logit = (x_TD[t].double() @ router.scorer.weight[e].double()).item()
            assert weights_TE[t, e].item() == pytest.approx(max(0.0, logit), abs=1e-6)
            assert (routing.indices_TK[t, e].item() == e) == (logit > 0)
            f[e] += (logit > 0) * E / (2 * T)
            r[e] += max(0.0, logit) / T
    wanted = sum(f[e] * r[e] for e in range(E))
    assert relu_balance(routing).item() == pytest.approx(wanted, rel=1e-5)
    total, parts = auxiliary_loss({"a": routing, "b": routing}, {"remoe": 1.0})
    assert parts["remoe"].item() == pytest.approx(wanted, rel=1e-5)
    assert total.item() == pytest.approx(1e-8 * wanted, rel=1e-5)


def test_its_coefficient_follows_the_zeros_of_all_layers():
    sparse, dense_ = routed(ReLU(k=2))[0], routed(ReLU(k=2))[0]
    with torch.no_grad():
        sparse.scorer.weight.copy_(-sparse.scorer.weight.abs())
        dense_.scorer.weight.copy_(dense_.scorer.weight.abs())
    x_TD = torch.rand(T, D)
    few, many = (Seen.of(router(x_TD), None) for router in (sparse, dense_))
    wider = Seen.of(build_router(RouterSpec(select=ReLU(k=4)), D, E)(x_TD), None)
    assert (few.k, wider.k) == (2, 4)
    state = sparse.coefficient
    state.move(few, [many, many])  # no zeros at all: larger
    assert state.value.item() == pytest.approx(1.2e-8)
    state.move(many, [few, few])
    assert state.value.item() == pytest.approx(1e-8)
    state.move(few, [few, many])  # half are zeros, 1 - 2 / 5 are wanted
    assert state.value.item() == pytest.approx(1.2e-8)
    other = replace(few, k=5)  # of a layer that takes all of its experts
    state.move(many, [few, many, other])  # two thirds are zeros, 1 - 3 / 5 are wanted
    assert state.value.item() == pytest.approx(1e-8)
    state.move(many, [replace(many, k=None), few])  # what routes otherwise does not count
    assert state.value.item() == pytest.approx(1e-8 / 1.2)
    for _ in range(200):
        state.move(few, [few])
    state.move(many, [many])
    assert state.value.item() == pytest.approx(1.2e-12), "it comes back from next to nothing"


def test_the_loss_is_refused_for_other_routers():
    with pytest.raises(RecipeError, match="select='relu'"):
        relu_balance(routed(TopK(K))[1])


def test_relu_needs_its_loss_and_it_alone_is_scaled():
    with pytest.raises(RecipeError, match="losses=remoe=1"):
        sc.override(sc.recipes.upcycling(4), {"router.select": "relu"})
    _, routing = routed(ReLU(k=2))
    total, parts = auxiliary_loss({"a": routing}, {"switch": 0.01, "remoe": 1.0})
    assert torch.allclose(total, 0.01 * parts["switch"] + 1e-8 * parts["remoe"])


def test_layers_with_other_numbers_keep_one_coefficient(tmp_path):
    changes = {"router.select": ReLU(k=2, coefficient=BySparsity(start=0.1, factor=1.5))}
    changes |= {"exact_at_start": False, "losses": {"remoe": 1.0}}
    recipe = sc.override(sc.override(sc.recipes.upcycling(6), changes), {"top_k": [1, 4]})
    model = upcycled({}, "tiny", recipe)
    train(model, tmp_path, steps=5)
    values = {layer.router.coefficient.value.item() for layer in model.sparsecraft.layers}
    assert len(values) == 1


def test_a_model_by_relu_trains_and_comes_back(tmp_path):
    changes = {
        "router.select": ReLU(k=2, coefficient=BySparsity(start=1e-3, factor=1.5)),
        "exact_at_start": False,
        "stages.0.losses": {"remoe": 1.0},
    }
    model = upcycled(changes, "tiny")
    log = train(model, tmp_path, steps=4)
    scales = {layer.router.coefficient.value.item() for layer in model.sparsecraft.layers}
    assert len(scales) == 1 and scales.pop() != pytest.approx(1e-3)
    assert all(entry["remoe_loss"] > 0 for entry in log if "remoe_loss" in entry)
    again = come_back(model, tmp_path / "saved")
    ids = torch.arange(3, 35).reshape(2, 16)
    assert torch.equal(model.eval()(ids).logits, again(ids).logits)


# ------------------------------------------------------------------------ adaptive coefficients


def test_the_coefficient_of_a_layer_follows_what_it_drops():
    option = ByDropRate(full_at=0.05, beta=0.9)
    router, routing = routed(TopK(K, capacity=Capacity(factor=0.9, coefficient=option)))
    value = 1.0
    for factor in (0.98, 3.0, 0.5):
        found = limited(routing, Capacity(factor=factor))
        dropped = (found.indices_TK == E).sum().item() / (T * K)
        value = 0.9 * value + 0.1 * min(1.0, dropped / 0.05)
        seen = Seen.of(found, None)
        router.coefficient.move(seen, [seen])
        assert router.coefficient.value.item() == pytest.approx(value, rel=1e-5)
    assert value < 1


def test_it_scales_the_balance_losses_of_its_layer_alone():
    _, routing = routed(TopK(K))
    scaled = {"loss_scale": torch.tensor(0.25), "scaled": BALANCE_LOSSES}
    traced = {"a": replace(routing, **scaled), "b": routing}
    total, parts = auxiliary_loss(traced, {"switch": 0.01, "z": 0.1})
    balance, z = switch_balance(routing), router_z(routing)
    assert torch.allclose(parts["switch"], balance) and torch.allclose(parts["z"], z)
    assert torch.allclose(total, 0.01 * balance * (1.25 / 2) + 0.1 * z)


# ------------------------------------------------------------------------- states that move

BIASED = {"router.select.balance": Bias(rate=0.01)}


def train(model, folder, steps: int, **more) -> list[dict]:
    """The lines of its log."""
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / "rows.jsonl", chat_rows())
    settings = {"batch_size": 4, "learning_rate": 1e-3, "max_length": 48, "log_every": 1}
    settings |= {"tokenizer": tokenizer(), "progress": False}
    sc.train(model, rows, folder / "run", steps=steps, **(settings | more))
    return model.sparsecraft.report["training"][-1]["log"]


def come_back(model, folder):
    sc.save(model, folder, standalone=True)
    return sc.load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_stay_float32(dtype):
    model = upcycled(BIASED)
    state = model.sparsecraft.layers[0].router.balance
    state.values_E += 1 / 3
    model.to(dtype)
    assert state.values_E.dtype == torch.float32 and (state.values_E == torch.tensor(1 / 3)).all()


def test_a_loop_of_ones_own_moves_them_once_a_step():
    model, ids = upcycled(BIASED), batch("llama")["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    state = model.sparsecraft.layers[0].router.balance
    for step in range(3):
        for part in (ids[:2], ids[2:]):
            model(input_ids=part, labels=part).loss.backward()
            assert state.values_E.abs().max() <= 0.01 * step + 1e-7
        optimizer.step()
        optimizer.zero_grad()
    model(input_ids=ids, labels=ids)
    assert 0 < state.values_E.abs().max() <= 0.03 + 1e-7
    before = state.values_E.clone()
    model(input_ids=ids, labels=ids)
    model.eval()(input_ids=ids)
    assert torch.equal(state.values_E, before), "no step, no move"


def two_steps(rank: int, world: int, folder: str) -> None:
    """A loop of one's own on this process's part of the rows."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model, ids = upcycled(BIASED), batch("llama")["input_ids"].repeat(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)  # so that all have the same weights
    for _ in range(2):
        model(input_ids=ids[rank::world], labels=ids[rank::world]).loss.backward()
        optimizer.step()
    model(input_ids=ids[rank::world])
    values = [layer.router.balance.values_E for layer in model.sparsecraft.layers]
    torch.save(values, f"{folder}/{world} {rank}")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_move_them_as_one_does(tmp_path):
    torch.multiprocessing.spawn(two_steps, (2, str(tmp_path)), nprocs=2)
    two_steps(0, 1, str(tmp_path))
    found = [torch.load(tmp_path / name) for name in ("1 0", "2 0", "2 1")]
    assert all(values.abs().max() > 0 for values in found[0])
    for layer in zip(*found, strict=True):
        assert torch.equal(layer[0], layer[1]) and torch.equal(layer[0], layer[2])


def test_trunk_and_model_may_take_turns():
    model, ids = upcycled(BIASED), batch("llama")["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    state = model.sparsecraft.layers[0].router.balance
    for run in (model.model, model, model.model):
        run(input_ids=ids)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(input_ids=ids, labels=ids)
    assert 0 < state.values_E.abs().max() <= 0.03 + 1e-7


def test_a_trainer_of_transformers_moves_them(tmp_path):
    model = upcycled(BIASED)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch("llama")["input_ids"].repeat(4, 1)]
    options = {"report_to": [], "use_cpu": True, "max_steps": 4, "save_strategy": "no"}
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=2, **options)
    Trainer(model, arguments, train_dataset=rows).train()
    biases = [layer.router.balance.values_E for layer in model.sparsecraft.layers]
    assert all(0 < b.abs().max() <= 0.03 + 1e-7 for b in biases)


@pytest.mark.parametrize("cut", [{"micro_batch": 4}, {"micro_batch": 1}])
def test_what_is_seen_does_not_depend_on_how_a_step_is_cut(cut, tmp_path):
    whole, parts = upcycled(BIASED, "tiny"), upcycled(BIASED, "tiny")
    parts.load_state_dict(whole.state_dict())
    train(whole, tmp_path / "a", steps=2, micro_batch=2)
    train(parts, tmp_path / "b", steps=2, **cut)
    for one, other in zip(whole.sparsecraft.layers, parts.sparsecraft.layers, strict=True):
        assert torch.equal(one.router.balance.values_E, other.router.balance.values_E)


def test_checkpointed_activations_are_not_seen_twice(tmp_path):
    models = [upcycled(BIASED, "tiny"), upcycled(BIASED, "tiny")]
    models[1].load_state_dict(models[0].state_dict())
    for number, model in enumerate(models):
        train(model, tmp_path / str(number), steps=2, activation_checkpointing=bool(number))
    states = [model.sparsecraft.layers[0].router.balance.values_E for model in models]
    assert torch.equal(*states)


def test_a_run_that_goes_on_ends_as_one_that_did_not_stop(tmp_path):
    changes = BIASED | {
        "router.select.capacity": Capacity(factor=0.5, coefficient=ByDropRate(beta=0.5))
    }
    whole = upcycled(changes, "tiny")
    start = copy.deepcopy(whole.state_dict())
    train(whole, tmp_path / "whole", steps=4)
    stopped = upcycled(changes, "tiny")
    stopped.load_state_dict(start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "TellsParts", Stops)
        with pytest.raises(InterruptedError):
            train(stopped, tmp_path / "parts", steps=4, save_every=2)
    again = upcycled(changes, "tiny")
    again.load_state_dict(start)
    train(again, tmp_path / "parts", steps=4, save_every=2, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


class Stops(trainers.TellsParts):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise InterruptedError


def test_they_are_saved_and_come_back(tmp_path):
    model = upcycled(BIASED | {"router.select.capacity": Capacity(coefficient=ByDropRate())})
    with torch.no_grad():
        for layer in model.sparsecraft.layers:
            layer.router.balance.values_E.uniform_(-1, 1)
            layer.router.coefficient.value.fill_(0.3)
    model.eval()
    again = come_back(model, tmp_path / "saved")
    for one, other in zip(model.sparsecraft.layers, again.sparsecraft.layers, strict=True):
        assert torch.equal(one.router.balance.values_E, other.router.balance.values_E)
        assert other.router.balance.values_E.dtype == torch.float32
        assert other.router.coefficient.value == one.router.coefficient.value
    assert torch.equal(model(**batch("llama")).logits, again(**batch("llama")).logits)


def test_threads_that_train_together_are_all_counted():
    model, ids = upcycled(BIASED | {"stages.0.losses": {}}), batch("llama")["input_ids"]
    step = model.sparsecraft.own_loss.step

    def run() -> None:
        for _ in range(20):
            model(input_ids=ids)

    threads = [threading.Thread(target=run) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert {vector[-1].item() for vector in step.sums.values()} == {80 * ids.numel()}


def test_a_state_that_is_no_number_is_refused(tmp_path):
    model = upcycled(BIASED)
    sc.save(model, tmp_path / "saved", standalone=True)
    tensors = load_file(tmp_path / "saved" / "moe.safetensors")
    name = next(name for name in tensors if name.endswith("values_E"))
    tensors[name][1] = math.nan
    save_file(tensors, tmp_path / "saved" / "moe.safetensors")
    with pytest.raises(CheckpointError, match="values_E"):
        sc.load(tmp_path / "saved")


def test_experts_come_and_go_with_their_biases():
    model = upcycled(BIASED)
    with torch.no_grad():
        for layer in model.sparsecraft.layers:
            layer.router.balance.values_E.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    sc.extend(model, dense("llama"), rows="reset")
    values = [layer.router.balance.values_E.tolist() for layer in model.sparsecraft.layers]
    assert values == [pytest.approx([0.1, 0.2, 0.3, 0.4, 0.0])] * len(values)
    remove(model, 1)
    values = [layer.router.balance.values_E.tolist() for layer in model.sparsecraft.layers]
    assert values == [pytest.approx([0.1, 0.3, 0.4, 0.0])] * len(values)
    model(**batch("llama"))


def test_what_was_noted_goes_with_the_experts_and_weights_it_was_of():
    ids = batch("llama")["input_ids"]
    for change in ("remove", "extend", "load"):
        model = upcycled(BIASED)
        start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        if change == "remove":
            remove(model, 1)
        elif change == "extend":
            sc.extend(model, dense("llama"), rows="reset")
        else:
            model.load_state_dict(start)
        before = model.sparsecraft.layers[0].router.balance.values_E.clone()
        model(input_ids=ids, labels=ids)
        assert torch.equal(model.sparsecraft.layers[0].router.balance.values_E, before), change


def test_a_save_has_the_last_step_and_frozen_layers_have_theirs(tmp_path):
    model, ids = upcycled(BIASED), batch("llama")["input_ids"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    again = come_back(model, tmp_path / "saved")
    assert again.sparsecraft.layers[0].router.balance.values_E.abs().max() > 0
    model(input_ids=ids, labels=ids)
    for one, other in zip(model.sparsecraft.layers, again.sparsecraft.layers, strict=True):
        assert torch.equal(one.router.balance.values_E, other.router.balance.values_E)


def test_relu_routing_takes_a_further_expert(tmp_path):
    changes = {"router.select": ReLU(k=2), "exact_at_start": False, "losses": {"remoe": 1.0}}
    model = upcycled(changes, "tiny")
    with torch.no_grad():
        for layer in model.sparsecraft.layers:
            layer.router.scorer.weight.copy_(-layer.router.scorer.weight.abs())
    data = {"data": ["say red"], "old_data": ["say blue"], "tokenizer": tokenizer()}
    found = sc.extend(model, tiny.llama(), unrelated=True, **data)
    assert math.isfinite(found.share_new)
    sc.save(model, tmp_path / "out", standalone=True)


def test_masks_that_are_no_table_of_tokens_say_nothing_of_padding():
    model, ids = upcycled({"router.select.capacity": HALF}, "qwen3"), batch("qwen3")["input_ids"]
    whole = model(input_ids=ids).logits
    size = ids.shape[1]
    seen = torch.ones(size, size).tril().bool()[None, None].expand(len(ids), 1, size, size)
    found = model(input_ids=ids, attention_mask={"full_attention": seen}).logits
    assert torch.allclose(found, whole, atol=1e-4)


def test_two_threads_limit_each_its_own_batch():
    model = upcycled({"router.select.capacity": Capacity(factor=0.5), "stages.0.losses": {}})
    ids = batch("llama")["input_ids"]
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][:, 4:] = 0
    wanted = [model(input_ids=ids, attention_mask=mask).logits.detach() for mask in masks]
    found: dict[int, list] = {0: [], 1: []}

    def run(number: int) -> None:
        for _ in range(5):
            given = {"input_ids": ids, "attention_mask": masks[number]}
            found[number].append(model(**given).logits.detach())

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for number in (0, 1):
        assert all(torch.equal(logits, wanted[number]) for logits in found[number])


# -------------------------------------------------------------------------------------- refusals


def test_parts_of_split_networks_have_neither():
    for option in ({"balance": Bias()}, {"capacity": Capacity()}):
        with pytest.raises(RecipeError, match="split network"):
            GateSpec(select=TopK(2, **option))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (lambda: Capacity(factor=0), "factor is 0"),
        (lambda: Capacity(kind="last"), "kind"),
        (lambda: Bias(rate=-1e-3), "rate"),
        (lambda: ByDropRate(full_at=0), "full_at"),
        (lambda: ByDropRate(beta=1), "beta"),
        (lambda: BySparsity(factor=1), "factor"),
        (lambda: BySparsity(start=0), "start"),
        (lambda: ReLU(k=0), "top_k"),
    ],
)
def test_numbers_out_of_range_are_refused(option, words):
    with pytest.raises(RecipeError, match=words):
        option()


def test_attention_experts_have_no_empty_slots():
    with pytest.raises(RecipeError, match="attention"):
        sc.override(sc.recipes.bam(2), {"edits.0.router.select": TopK(1, capacity=Capacity())})


def test_a_bias_does_not_export_and_a_capacity_does(tmp_path):
    biased, limited_ = tiny.llama(), tiny.llama()
    sc.convert(biased, sc.override(sc.recipes.upcycling(4), BIASED))
    with pytest.raises(ExportError, match="balance"):
        sc.export(biased, "mixtral", tmp_path / "biased")
    changes = {"router.select.capacity": Capacity()}
    sc.convert(limited_, sc.override(sc.recipes.upcycling(4), changes))
    sc.export(limited_, "mixtral", tmp_path / "limited")
