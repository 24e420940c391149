"""Edits of a file or a folder, each from a few choices.

The tests let hypothesis choose, the long run a generator of random numbers.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sparsecraft.checkpoint.jsonfile import json_digest

T = TypeVar("T")

CODE = "import os\nos.system('touch CANARY')\nopen('CANARY', 'w').write('ran')\nclass E: pass\n"


class Choose(Protocol):
    """What picks: `random.Random` has this too."""

    def choice(self, options: Sequence[T]) -> T: ...

    def randrange(self, end: int) -> int: ...


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**5, 10**7, 10**9, 2**63, 10**30, -(10**12)),
    *(0.5, -1.0, 1e308, float("inf"), float("nan"), "", "x", "0", "../x", "/etc/passwd"),
    *("evil/kernel", "kernels-community/flash-attn2", "evil.E", "\x00", "\u202e" * 9, "a" * 5000),
    *([], {}, [[]], [1], ["x"], [None], {"x": 1}, {"": None}, [10**9] * 3, {"auto_map": "evil.E"}),
    *("LlamaForCausalLM", "sys", "float32", "int8", "meta", "smollm2", "gptq", "bitsandbytes"),
)
# Keys that make readers do more than read.
KEYS = (
    *("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation"),
    *("quantization_config", "transformers_weights", "architectures", "model_type", "dtype"),
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_local_experts", "tokenizer_class"),
    *(
        "custom_generate",
        "chat_template",
        "rope_parameters",
        "layer_types",
        "base_config",
        "id2label",
    ),
    *("peft_type", "alpha_pattern", "rank_pattern", "weight_map", "id2label", "eos_token_id"),
)


DEEP = b"[" * 100_000
MOST_SIGNED = 10**7  # bytes of a file that is signed anew


def mutate(folder: Path, choose: Choose, signed: bool = False) -> str:
    """Edit one file of a folder, or what stands in its place; what was done, in words.

    Args:
        signed: sign recipe.json anew.
    """
    (folder / "evil.py").write_text(CODE)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".py")
    path = choose.choice([p for p in files if _may(p, signed)])
    ways: list[Callable[[Path, Choose], str]] = [*BYTES]
    if path.suffix == ".json":
        ways = [*JSON * 5, *BYTES]
    elif path.suffix == ".safetensors":
        ways = [*SAFE * 3, *BYTES]
    elif path.suffix == ".whl":
        ways = [*WHEEL * 4, *BYTES]
    ways += [] if signed else PLACES
    said = choose.choice(ways)(path, choose)
    if signed:
        sign(folder)
    return f"{path.relative_to(folder)}: {said}"


def _may(path: Path, signed: bool) -> bool:
    return path.suffix == ".json" if signed else path.name not in ("README.md", "evil.py")


def sign(folder: Path) -> None:
    """Let recipe.json say that what stands in the folder now is what was written."""
    names = ("recipe.json", "config.json")
    if any((folder / name).stat().st_size > MOST_SIGNED for name in names):
        return
    try:
        manifest = json.loads((folder / "recipe.json").read_text())
        manifest.pop("digest", None)
        manifest["config"] = json_digest(json.loads((folder / "config.json").read_text()))
        (folder / "recipe.json").write_text(
            json.dumps(manifest | {"digest": json_digest(manifest)})
        )
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return  # no JSON any more: as it is


# ------------------------------------------------------------------ JSON
def _spots(data: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        found.append((data, key))
        _spots(data[key], found)
    return found


def _edited(path: Path, edit: Callable[[Any], str]) -> str:
    data = json.loads(path.read_text())
    said = edit(data)
    path.write_text(json.dumps(data))
    return said


def replace(path: Path, choose: Choose) -> str:
    def edit(data: Any) -> str:
        spots = _spots(data, []) or [(data, "x")]
        at, key = choose.choice(spots)
        at[key] = choose.choice(VALUES)
        return f"{str(key)!r:.40} is {at[key]!r:.40}"

    return _edited(path, edit)


def add(path: Path, choose: Choose) -> str:
    def edit(data: Any) -> str:
        inside = [data, *(at[key] for at, key in _spots(data, []))]
        at = choose.choice([d for d in inside if isinstance(d, dict)] or [{}])
        key = choose.choice(KEYS)
        at[key] = choose.choice(VALUES)
        return f"new {key!r} is {at[key]!r:.40}"

    return _edited(path, edit)


def drop(path: Path, choose: Choose) -> str:
    def edit(data: Any) -> str:
        spots = _spots(data, [])
        if not spots:
            return "nothing"
        at, key = choose.choice(spots)
        del at[key]
        return f"without {str(key)!r:.40}"

    return _edited(path, edit)


def other(path: Path, choose: Choose) -> str:
    texts = (b"", b"[]", b"7", b"null", DEEP, b'{"a": 1, "a": 2}', b"\xff\xfe{}", b'{"a": NaN}')
    text = choose.choice(texts)
    path.write_bytes(text)
    return f"holds {text[:20]!r}"


JSON = [replace, add, drop, other]


# ------------------------------------------------------------------ bytes
def flip(path: Path, choose: Choose) -> str:
    content = bytearray(path.read_bytes())
    if content:
        at = choose.randrange(len(content))
        content[at] ^= 1 << choose.randrange(8)
        path.write_bytes(content)
        return f"a bit of byte {at}"
    return "empty as before"


def cut(path: Path, choose: Choose) -> str:
    size = choose.randrange(path.stat().st_size + 1)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def grow(path: Path, choose: Choose) -> str:
    size = choose.choice((1, 4096, 10**9, 10**12))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    return f"{size} zeros more"


class _Runs:
    def __reduce__(self):
        return os.system, ("touch CANARY",)


def pickled(path: Path, choose: Choose) -> str:
    path.write_bytes(pickle.dumps(_Runs()))
    return "a pickle that runs code"


BYTES = [flip, cut, grow, pickled]


# ------------------------------------------------------------------ what stands in its place
def gone(path: Path, choose: Choose) -> str:
    path.unlink()
    return "gone"


def pipe(path: Path, choose: Choose) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def link(path: Path, choose: Choose) -> str:
    target = choose.choice((path.name, "/dev/zero", "/dev/tty", "/etc/passwd", "/nowhere", "."))
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}"


def directory(path: Path, choose: Choose) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


PLACES = [gone, pipe, link, directory]


# ------------------------------------------------------------------ safetensors
def header(path: Path, choose: Choose) -> str:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    data = json.loads(content[8 : 8 + length])
    names = [name for name in data if name != "__metadata__"]
    name = choose.choice(names)
    way = choose.choice(("dtype", "shape", "data_offsets", "name", "many", "huge"))
    values = {
        "dtype": choose.choice(("I32", "F16", "BF16", "F64", "BOOL", "U8", "ZZ", 5)),
        "shape": choose.choice(([], [0], [-1], [10**9, 10**9], [1, 1, 1], "x", [2**63])),
        "data_offsets": choose.choice(([0, 0], [0, 10**15], [8, 4], [-8, 0], [])),
    }
    if way in values:
        data[name][way] = values[way]
    elif way == "name":
        data[choose.choice(("x", "../x", "", "model.layers.9999.mlp.up_proj.weight"))] = data.pop(
            name
        )
    elif way == "huge":
        data[name] |= {"shape": [10**9, 64], "data_offsets": [0, 256 * 10**9]}
    else:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        data |= {f"t{i}": empty for i in range(300_000)}
    encoded = json.dumps(data).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    return f"the header's {way} of {name!r:.60} ({values.get(way)})"


def length(path: Path, choose: Choose) -> str:
    content = path.read_bytes()
    size = choose.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", size) + content[8:])
    return f"a header of {size} bytes"


SAFE = [header, length]


# ------------------------------------------------------------------ wheels
def member(path: Path, choose: Choose) -> str:
    name = choose.choice(
        ("../CANARY", "/tmp/CANARY", "package/model/../../../CANARY", "package/model/x", "a\x00b")
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    return f"with {name!r}"


def bomb(path: Path, choose: Choose) -> str:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/model/zeros", bytes(2 * 10**8))
    return "with 200 MB of zeros"


WHEEL = [member, bomb]
