"""Our recipes as methods of PEFT. Importing this package registers them.

`sparsecraft.interop.doors` imports it as soon as PEFT is imported, so that `import sparsecraft` is
enough.
"""

from __future__ import annotations

import peft
from peft.config import PeftConfigMixin
from peft.utils import register_peft_method

from sparsecraft.interop import watching
from sparsecraft.interop.peft.configs import CONFIGS
from sparsecraft.interop.peft.tuner import RecipeTuner


def register() -> None:
    """Make PEFT know our types; where it does, nothing happens."""
    for config_class in CONFIGS:
        name = config_class.TYPE
        if name not in peft.PeftType.__members__:
            _extend(name)
        if peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(name) is not config_class:
            register_peft_method(
                name=name.lower(),
                config_cls=config_class,
                model_cls=RecipeTuner,
                prefix=RecipeTuner.prefix,
            )


def _extend(name: str) -> None:
    """Add a member to PEFT's enumeration of types, which is closed to other libraries."""
    kind = peft.PeftType
    member = str.__new__(kind, name)
    member._name_ = member._value_ = name
    type.__setattr__(kind, name, member)
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[name] = member


def watch() -> None:
    """Let PEFT sign the adapters of ours that it writes, and check those that it reads."""
    model, config = peft.PeftModel, PeftConfigMixin
    model.save_pretrained = watching.signed(model.save_pretrained)
    model.load_adapter = watching.checked(model.load_adapter)
    for kind, at in ((model, 1), (config, 0)):
        theirs = kind.from_pretrained.__func__
        kind.from_pretrained = classmethod(watching.checked(theirs, at))


register()
watch()
