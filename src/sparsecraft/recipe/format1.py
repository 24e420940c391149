"""Format 1 of recipes -> format 2.

Format 1 had one flat router for whole experts and for parts, one kind of stages for training and
fitting, and `base_quantization`. Its fields and their defaults stand here, as they were.
"""

from __future__ import annotations

from typing import Any, Literal

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe.numbers import check_deviation, check_whole
from sparsecraft.recipe.stages import Stage
from sparsecraft.recipe.typed import read, shown

RECIPE = (
    "name", "title", "paper", "variant", "exact_at_start", "base_quantization", "others",
    "expansion", "edits", "stages",
)  # fmt: skip

# Field -> its type and default.
ROUTER: dict[str, tuple[Any, Any]] = {
    "scorer": (
        Literal["linear", "domain", "similarity", "mlp", "norm", "analytic", "oracle"], "linear",
    ),
    "select": (
        Literal["top_k", "sample", "soft", "slots", "share", "relative", "threshold"], "top_k",
    ),
    "top_k": (int | None, 2),
    "soft_first": (bool, False),
    "threshold": (float | None, None),
    "shared": (int, 0),
    "squash": (Literal["none", "abs", "sigmoid", "softmax"], "none"),
    "weighting": (
        Literal["softmax", "one", "scaled", "straight_through", "score", "gain"], "softmax",
    ),
    "target": (
        Literal["mass", "deviation", "squared_deviation", "output_norm", "intermediate_norm"],
        "mass",
    ),
    "hidden": (int | None, None),
    "bias": (float | None, None),
    "normalize": (bool, False),
    "renormalize": (bool, True),
    "temperature": (float, 1.0),
    "gates_base": (bool, False),
    "reads": (Literal["input", "output"], "input"),
    "decides": (Literal["token", "head", "sequence", "sentence"], "token"),
    "encoder": (str, "minilm"),
    "sentence_dim": (int, 384),
    "init": (
        Literal["kaiming_uniform", "normal", "uniform", "zeros", "hidden", "kmeans"],
        "kaiming_uniform",
    ),
    "init_std": (float, 0.02),
    "init_repeat": (int, 1),
    "extended": (int, 0),
    "balanced": (bool, True),
}  # fmt: skip

# What format 1 allowed to say where it meant nothing.
IDLE = ("renormalize", "encoder", "sentence_dim", "init", "init_std", "target")

STAGE = (
    "name", "trains", "losses", "loss_schedule", "runs", "activation", "fit", "buckets",
    "optimizer", "learning_rate", "router_learning_rate", "schedule", "warmup_ratio",
    "warmup_steps", "weight_decay", "max_grad_norm", "batch_size", "max_length", "epochs",
)  # fmt: skip

DIFFERENCE = ("redraw", "redraw_apart", "permute", "noise_std", "noise_share")

FFN = ("kind", "num_experts", "init", "width", "granularity", "blend", "scaling", "scale")

FIT = (
    "what", "sparsity", "dropout", "loss", "tokens", "epochs", "batch_tokens", "learning_rate",
    "holdout",
)  # fmt: skip

BY_THRESHOLD = ("share", "relative", "threshold")


def upgraded_1(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe of format 1 as one of format 2; values are checked when that is read.

    Raises:
        RecipeError: a field that format 1 did not have, or one that its router did not use.
    """
    _check_known(data, RECIPE, "recipe")
    data = dict(data)
    if "base_quantization" in data:
        packed = data.pop("base_quantization")
        data["backbone"] = None if packed is None else {"kind": packed}
    for name, upgrade in (("edits", _edit), ("stages", _stage)):
        if isinstance(data.get(name), (list, tuple)):
            data[name] = [upgrade(v, f"recipe.{name}.{n}") for n, v in enumerate(data[name])]
    return data


def _edit(edit: Any, path: str) -> Any:
    if not isinstance(edit, dict):
        return edit
    new = dict(edit)
    if isinstance(edit.get("experts"), dict):
        new["experts"] = _experts(edit["experts"], f"{path}.experts")
    if isinstance(edit.get("router"), dict):
        new["router"] = _router(edit["router"], f"{path}.router")
    return new


def _experts(old: dict[str, Any], path: str) -> dict[str, Any]:
    """What is random in copies became a type of its own; `init` said "copy" and nothing else."""
    if old.get("kind", "ffn") != "ffn":
        return old
    _check_known(old, FFN + DIFFERENCE, path)
    new = {name: value for name, value in old.items() if name not in DIFFERENCE}
    read(Literal["copy"], new.pop("init", "copy"), f"{path}.init")
    differ = {name: old[name] for name in DIFFERENCE if name in old}
    return new | {"differ": differ} if differ else new


def _router(old: dict[str, Any], path: str) -> dict[str, Any]:
    _check_known(old, tuple(ROUTER), path)
    left = {
        name: read(hint, old.get(name, default), f"{path}.{name}")
        for name, (hint, default) in ROUTER.items()
    }
    gate = left.pop("weighting") != "softmax"
    _check_values(left, gate, path)
    if gate:
        new = {
            "kind": "gate",
            "scorer": _part_scorer(left),
            "weighting": old["weighting"],
            **{name: left.pop(name) for name in ("shared", "squash", "target")},
        }
    else:
        decides = {"kind": left.pop("decides")}
        if decides["kind"] == "sentence":
            decides |= {"encoder": left["encoder"], "dim": left["sentence_dim"]}
        names = ("reads", "temperature", "gates_base")
        scorer = _scorer(left)
        new = {"kind": "router", "scorer": scorer, "decides": decides}
        new |= {name: left.pop(name) for name in names}
    new |= {"select": _select(left, gate), "balanced": left.pop("balanced")}
    for name, value in left.items():
        if value != ROUTER[name][1] and name not in IDLE:
            raise RecipeError(
                f"{path}.{name} is {value!r}, which a {new['scorer']['kind']} scorer with "
                f"{new['select']['kind']} selection, weighted by "
                f"{old.get('weighting', 'softmax')}, does not have; leave it out."
            )
    return new


def _check_values(old: dict[str, Any], gate: bool, path: str) -> None:
    """Refuse what format 1 did, of fields that may be idle and are then in no field of format 2.

    Raises:
        RecipeError: a field that contradicts another one, or is out of its range.
    """
    check_deviation(old["init_std"], f"{path}.init_std")
    check_whole(f"{path}.sentence_dim", old["sentence_dim"])
    select, top_k = old["select"], old["top_k"]
    wanted = 1 if select == "sample" else None
    if (top_k is None) if select == "top_k" else (top_k != wanted):
        raise RecipeError(
            f"{path}.top_k is {top_k} with select={select!r}, which takes "
            f"{'a number' if select == 'top_k' else f'top_k={wanted}'}."
        )
    if (select in BY_THRESHOLD) == (old["threshold"] is None):
        raise RecipeError(
            f"{path}.threshold is {old['threshold']} with select={select!r}, which takes "
            f"{'a number' if select in BY_THRESHOLD else 'threshold=None'}."
        )
    if gate and old["init"] in ("uniform", "hidden", "kmeans"):
        raise RecipeError(
            f"{path}.init is {old['init']!r}, which is for whole experts; the router of a split "
            "network starts by kaiming_uniform, normal or zeros."
        )
    if old["scorer"] == "domain" and old["init"] != "normal":
        raise RecipeError(
            f"{path}.init is {old['init']!r} with scorer='domain', whose projection starts normal; "
            "set init='normal'."
        )
    of_domains = old["scorer"] == "domain" and old["decides"] != "sentence"
    if old["encoder"] == "self" and not of_domains:
        raise RecipeError(
            f"{path}.encoder is 'self' with scorer={old['scorer']!r} and decides="
            f"{old['decides']!r}; only domains are embedded by the model itself."
        )


def _scorer(left: dict[str, Any]) -> dict[str, Any]:
    """Of whole experts; what it takes is no longer `left`."""
    kind = left.pop("scorer")
    if kind == "domain":
        return {
            "kind": kind,
            "encoder": left.pop("encoder"),
            "dim": left.pop("sentence_dim"),
            "std": left.pop("init_std"),
        }
    if kind != "linear":
        return {"kind": kind}
    names = {"init_repeat": "repeat", "extended": "extended"}
    new = {"kind": kind, "start": _start(left)}
    return new | {name: left.pop(old) for old, name in names.items()}


def _part_scorer(left: dict[str, Any]) -> dict[str, Any]:
    kind = left.pop("scorer")
    new: dict[str, Any] = {"kind": kind}
    if kind == "linear":
        new["start"] = _start(left)
    if kind in ("linear", "norm"):
        new["bias"] = left.pop("bias")
    if kind == "analytic":
        new["normalize"] = left.pop("normalize")
    if kind in ("mlp", "norm"):
        hidden = left.pop("hidden")
        new |= {} if hidden is None else {"hidden": hidden}
    return new


def _start(left: dict[str, Any]) -> dict[str, Any]:
    kind, std = left.pop("init"), left.pop("init_std")
    return {"kind": kind} if kind in ("kaiming_uniform", "zeros") else {"kind": kind, "std": std}


def _select(left: dict[str, Any], gate: bool) -> dict[str, Any]:
    kind, k = left.pop("select"), left.pop("top_k")
    new: dict[str, Any] = {"kind": kind}
    if kind == "top_k":
        new["k"] = k
        new |= {} if gate else {"renormalize": left.pop("renormalize")}
    if kind in BY_THRESHOLD:
        new["threshold"] = left.pop("threshold")
    if kind == "sample":
        new["first_soft"] = left.pop("soft_first")
    return new


def _stage(old: Any, path: str) -> Any:
    if not isinstance(old, dict):
        return old
    _check_known(old, STAGE, path)
    old = dict(old)
    fit, deal = old.pop("fit", None), old.pop("buckets", None)
    if fit is None:
        return {"kind": "train", **old, "deal": deal}
    _check_known(fit, FIT, f"{path}.fit")
    if deal is not None:
        raise RecipeError(f"{path} has fit and buckets; it must have one of them.")
    read(Stage, {"kind": "train", **old}, path)  # idle in a fit, and refused where it is wrong
    kept = {name: old[name] for name in ("batch_size", "max_length") if name in old}
    return {"kind": "fit", "name": old.get("name", "train"), **fit, **kept}


def _check_known(data: Any, known: tuple[str, ...], path: str) -> None:
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is {shown(data)}; it must be an object with fields.")
    for name in data:
        if name not in known:
            raise RecipeError(f"{path} has no field {name!r}." + did_you_mean(str(name), known))
