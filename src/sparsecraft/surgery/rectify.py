"""ReLU where a dense network had another activation: in its modules, and in the configuration.

ReLUfication changes the activation of split networks. Their dense form computes the same only if
the configuration, from which transformers builds the saved model again, can say so: it has one
field for all networks, and in some models other modules read the field too (BERT's head).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsecraft.dense.forms import join
from sparsecraft.surgery.plan import PlannedEdit

# What families call their activation; T5 has two fields for it.
FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
T5_FORM = "feed_forward_proj"


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of a configuration, or of one of the configurations inside it.

    Attributes:
        inside: the field that holds the inner configuration; None for the outer one.
    """

    inside: str | None
    name: str

    def __str__(self) -> str:
        return f"config.{self.inside}.{self.name}" if self.inside else f"config.{self.name}"

    def changed(self, config: Any) -> Any:
        """A copy of the model's configuration that says ReLU here."""
        config = copy.deepcopy(config)
        inner = getattr(config, self.inside) if self.inside else config
        for name, value in self.values(inner).items():
            setattr(inner, name, value)
        return config

    def values(self, inner: Any) -> dict[str, str]:
        """The fields to be changed, and to what."""
        values = {self.name: "relu"}
        if self.name == "dense_act_fn":
            gated = getattr(inner, T5_FORM, "").startswith("gated-")
            values[T5_FORM] = "gated-relu" if gated else "relu"
        return values


def activation_of(item: PlannedEdit) -> str:
    """Path of the dense network's activation."""
    return join(item.site.owner, item.site.form.activation)


def setting_of(model: nn.Module, items: Iterable[PlannedEdit]) -> tuple[Setting | None, str]:
    """The field that says ReLU for exactly the networks of `items`; or None, and why there is none.

    Models without weights are built from the changed configuration and compared by the classes of
    their modules, so that the answer holds for a family that is in no list.
    """
    items = [*items]
    if any(item.site.form.activation is None for item in items):
        return None, "its networks call their activation as a function"
    wanted = {activation_of(item) for item in items}
    now = _modules(model, model.config)
    reason = "no field of its configuration is known to hold the activation"
    for setting in _settings(model.config):
        then = _modules(model, setting.changed(model.config))
        changed = {path for path, kind in now.items() if then.get(path) is not kind}
        if changed == wanted and now.keys() == then.keys():
            return setting, ""
        if others := sorted(changed - wanted):
            reason = f"{setting} would put it into {others[0]!r} too"
        elif changed:
            reason = f"{setting} leaves {sorted(wanted - changed)[0]!r} as it is"
    return None, reason


def _modules(model: nn.Module, config: Any) -> dict[str, type]:
    """Path -> class of every module of the dense model of a configuration."""
    with torch.device("meta"):
        built = type(model)._from_config(copy.deepcopy(config))
    return {path: type(module) for path, module in built.named_modules(remove_duplicate=False)}


def _settings(config: Any) -> Iterator[Setting]:
    for inside in (None, *getattr(config, "sub_configs", {})):
        inner = getattr(config, inside, None) if inside else config
        for name in FIELDS:
            if isinstance(getattr(inner, name, None), str):
                yield Setting(inside, name)


def holders(model: nn.Module, setting: Setting) -> list[Any]:
    """Every configuration in the model that has the field: parts of a model keep copies (T5)."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    if setting.inside:
        inner = [getattr(config, setting.inside, None) for config in configs.values()]
        configs |= {id(config): config for config in inner}
        kind = type(getattr(model.config, setting.inside))
        configs = {key: config for key, config in configs.items() if type(config) is kind}
    return [config for config in configs.values() if hasattr(config, setting.name)]
