"""The transcriptions of `mixtures.py` in a whole dense model: hooks replace what a paper replaces.

ROLES says by hand where each family keeps its projections. Nothing here knows the library: values
of the parameters come from `read(path, rows)`, which returns those at one projection.
"""

import torch

from tests.reference import mixtures

# Role -> end of the path, and (start, length) where a matrix holds several projections.
D, F, KV = 32, 48, 16  # the widths of tests/cases.py; KV where keys are grouped
ROLES = {
    "llama": {
        "query": ("self_attn.q_proj", None),
        "key": ("self_attn.k_proj", None),
        "value": ("self_attn.v_proj", None),
        "output": ("self_attn.o_proj", None),
        "gate": ("mlp.gate_proj", None),
        "up": ("mlp.up_proj", None),
        "down": ("mlp.down_proj", None),
        "act": ("mlp.act_fn", None),
    },
    "phi3": {
        "query": ("self_attn.qkv_proj", (0, D)),
        "key": ("self_attn.qkv_proj", (D, KV)),
        "value": ("self_attn.qkv_proj", (D + KV, KV)),
        "output": ("self_attn.o_proj", None),
        "gate": ("mlp.gate_up_proj", (0, F)),
        "up": ("mlp.gate_up_proj", (F, F)),
        "down": ("mlp.down_proj", None),
        "act": ("mlp.activation_fn", None),
    },
    "gpt2": {
        "query": ("attn.c_attn", (0, D)),
        "key": ("attn.c_attn", (D, D)),
        "value": ("attn.c_attn", (2 * D, D)),
        "output": ("attn.c_proj", None),
        "up": ("mlp.c_fc", None),
        "down": ("mlp.c_proj", None),
        "act": ("mlp.act", None),
    },
    "t5_gated": {
        "query": ("Attention.q", None),
        "key": ("Attention.k", None),
        "value": ("Attention.v", None),
        "output": ("Attention.o", None),
        "gate": ("DenseReluDense.wi_0", None),
        "up": ("DenseReluDense.wi_1", None),
        "down": ("DenseReluDense.wo", None),
        "act": ("DenseReluDense.act", None),
    },
    "bert": {
        "query": ("self.query", None),
        "key": ("self.key", None),
        "value": ("self.value", None),
        "output": ("attention.output.dense", None),
        "up": ("intermediate.dense", None),
        "down": ("output.dense", None),
        "act": ("intermediate.intermediate_act_fn", None),
    },
}
ROLES["t5"] = {r: p for r, p in ROLES["t5_gated"].items() if r != "gate"}
ROLES["t5"]["up"] = ("DenseReluDense.wi", None)


def places(model, family, *roles):
    """(path, rows) of every projection of these roles that the family has, in the model's order."""
    found = []
    for role in roles:
        end, rows = ROLES[family].get(role, (None, None))
        for path, _ in model.named_modules():
            attention = path.endswith("attention.output.dense")  # BERT's, not its FFN's
            if end and path.endswith(end) and (role != "down" or not attention):
                found.append((path, rows))
    return found


def networks(model, family):
    """For each feed-forward network: role -> (path, rows)."""
    roles = [role for role in ("gate", "up", "down", "act") if role in ROLES[family]]
    columns = [places(model, family, role) for role in roles]
    return [dict(zip(roles, row, strict=True)) for row in zip(*columns, strict=True)]


def whole(found):
    """The matrices that hold these projections, once each."""
    return [(path, None) for path in dict.fromkeys(path for path, _ in found)]


def matrix(model, path, rows=None):
    """(weight (out, in), bias) of a Linear or a Conv1D, or of some of its rows."""
    module = model.get_submodule(path)
    weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.t()
    start, length = rows or (0, len(weight))
    bias = module.bias
    return weight[start : start + length], None if bias is None else bias[start : start + length]


def flat(x):
    return x.reshape(-1, x.shape[-1])


def change_output(model, path, rows, change):
    """The projection's output rows become change(x, those rows), for tokens as (N, features)."""

    def hook(module, args, output):
        y = flat(output)
        start, length = rows or (0, y.shape[1])
        part = change(flat(args[0]), y[:, start : start + length])
        return torch.cat([y[:, :start], part, y[:, start + length :]], 1).reshape(output.shape)

    model.get_submodule(path).register_forward_hook(hook)


def change_intermediate(model, network, change):
    """The last matrix reads change(x, gate or up branch, its input), x the network's input."""
    seen = {}

    def keep(module, args, output):
        seen["x"] = flat(args[0])
        seen[id(module)] = flat(output)

    first = [network[role] for role in ("gate", "up") if role in network]
    for path in dict.fromkeys(path for path, _ in first):
        model.get_submodule(path).register_forward_hook(keep)

    def branch(path, rows):
        y = seen[id(model.get_submodule(path))]
        start, length = rows or (0, y.shape[1])
        return y[:, start : start + length]

    def hook(module, args):
        branches = [branch(path, rows) for path, rows in first]
        return (change(seen["x"], branches, flat(args[0])).reshape(args[0].shape),)

    model.get_submodule(network["down"][0]).register_forward_pre_hook(hook)


def mov(model, family, read, **kwargs):
    """Keys, values and intermediate activations; read -> (router, vectors). (IA)3: router None."""

    def scaled(u, x, router, vectors):
        if router is None:
            return mixtures.ia3(u, vectors[0])
        return mixtures.mov(u, x, router, vectors, **kwargs)

    for path, rows in places(model, family, "key", "value"):
        parts = read(path, rows)
        change_output(model, path, rows, lambda x, u, parts=parts: scaled(u, x, *parts))
    for network in networks(model, family):
        parts = read(*network["up"])
        change_intermediate(model, network, lambda x, _, u, parts=parts: scaled(u, x, *parts))


def mov_released(model, family, read, head, k=None):
    """As the published code has it; `head` is the width of an attention head."""
    for path, rows in places(model, family, "key", "value"):
        router, vectors = read(path, rows)
        by_head = vectors.reshape(len(vectors), -1, head)
        change_output(
            model,
            path,
            rows,
            lambda x, u, r=router, v=by_head: mixtures.mov_released_heads(u, r, v, k),
        )
    for network in networks(model, family):
        act, parts = model.get_submodule(network["act"][0]), read(network["act"][0], None)

        def change(x, branches, u, act=act, parts=parts):
            linear_branch = branches[1] if len(branches) == 2 else None
            return mixtures.mov_released_ffn(act(branches[0]), linear_branch, *parts, k)

        change_intermediate(model, network, change)


def low_rank(model, found, equation, read):
    """`equation(x, weight, bias, *read(path, rows))` at each projection."""
    for path, rows in found:
        weight, bias = matrix(model, path, rows)
        parts = read(path, rows)
        change_output(
            model,
            path,
            rows,
            lambda x, _, w=weight, b=bias, parts=parts: equation(x, w, b, *parts),
        )


def mixlora(model, family, read, alpha, k):
    """Every network's output; read(index) -> router and role -> (a, b)."""
    for index, network in enumerate(networks(model, family)):
        router, loras = read(index)
        act = model.get_submodule(network["act"][0])
        parts = {role: matrix(model, *network[role]) for role in network if role != "act"}
        seen = {}

        def keep(module, args, seen=seen):
            seen["x"] = flat(args[0])

        def hook(module, args, output, seen=seen, parts=parts, act=act, r=router, loras=loras):
            y = mixtures.mixlora(seen["x"], act, parts, r, loras, alpha, k)
            return y.reshape(output.shape)

        model.get_submodule(network["up"][0]).register_forward_pre_hook(keep)
        model.get_submodule(network["down"][0]).register_forward_hook(hook)
