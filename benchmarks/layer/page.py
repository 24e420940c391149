"""The pages of pesc.py and mixture.py: tables from their results."""

from __future__ import annotations

import json

from benchmarks.lab.tables import markdown


def ratio_rows(rows: list[dict], names: list[str]) -> list[list]:
    table = []
    for row in rows:
        ms = row["ms"]
        cells = [f"{ms[n]:.3f} ({ms[n] / ms['dense']:.2f}x)" if n in ms else None for n in names]
        what = "forward + backward" if row["backward"] else "forward"
        table.append([row["tokens"], what, f"{ms['dense']:.3f}", *cells])
    return table


def path_rows(rows: list[dict], paths: list[str]) -> list[list]:
    return [
        [
            r["tokens"],
            "forward + backward" if r["backward"] else "forward",
            *(f"{r['ms'][p]:.3f}" for p in paths),
            min(r["ms"], key=r["ms"].get),
        ]
        for r in rows
    ]


def tables(result: dict) -> str:
    names = ["sparsecraft", "one_adapter", "released_style"]
    header = [
        "tokens",
        "pass",
        "dense FFN",
        "sparsecraft",
        "one adapter, width K*H",
    ]
    out = [
        f"{result['machine']}, torch {result['torch']}, seed {result['seed']}, "
        f"{result['shape']}; measured ceilings {json.dumps(result['ceilings'])}."
    ]
    out += [
        "## Eager: milliseconds (over the dense FFN)",
        markdown([*header, "released style"], ratio_rows(result["eager"], names)),
    ]
    for key, title in (
        ("graph", "CUDA graph, every side"),
        ("compiled", "torch.compile, every side"),
    ):
        rows = result.get(key)
        if isinstance(rows, str):
            out += [f"## {title}", f"Not measured: {rows}"]
        elif rows:
            out += [
                f"## {title}: milliseconds (over the dense FFN under the same)",
                markdown(header, ratio_rows(rows, names[:2])),
            ]
    for key, title in (("paths", "eager"), ("paths_graph", "CUDA graph")):
        paths = list(result[key][0]["ms"]) if result.get(key) else []
        if paths:
            out += [
                f"## Dispatch paths, the bank alone, {title}: milliseconds",
                markdown(["tokens", "pass", *paths, "fastest"], path_rows(result[key], paths)),
            ]
    out += [
        "## Relative error against the loop in float64 (bf16 operands)",
        markdown(
            ["path", *result["errors"]["loop"]],
            [
                [path, *(f"{e:.1e}" for e in found.values())]
                for path, found in result["errors"].items()
            ],
        ),
    ]
    out += kernel_tables(result.get("kernels", {}))
    return "\n\n".join(out)


def kernel_tables(kernels: dict[str, dict]) -> list[str]:
    out = []
    for name, found in kernels.items():
        rows = found["kernels"]
        total = sum(row["us"] for row in rows)
        out += [
            f"## Kernels of `{name}` at 8192 tokens, forward + backward: {total:.0f} us "
            f"in all, and {found['idle_us']:.0f} us between kernels",
            markdown(
                ["us", "calls", "kernel"],
                [
                    [f"{r['us']:.0f}", f"{r['calls']:g}", f"`{r['kernel'][:100]}`"]
                    for r in rows[:15]
                ],
            ),
        ]
    return out


# ------------------------------------------------------------------ mixture.py
def mixture_tables(result: dict) -> str:
    out = [
        f"{result['machine']}, torch {result['torch']}, seed {result['seed']}, "
        f"{result['shape']}; measured ceilings {json.dumps(result['ceilings'])}."
    ]
    for title, graphed in (("Eager", False), ("CUDA graph", True)):
        rows = [row for row in result["times"] if row["graph"] == graphed]
        if rows:
            out += [
                f"## {title}: milliseconds (median over rounds of the ratio to the plain Linear)",
                mixture_rows(rows),
            ]
    if result.get("memory"):
        out += [
            "## Peak memory, forward + backward: MiB with weights, x and dy (over plain); beyond "
            "them",
            memory_rows(result["memory"]),
        ]
    out += [
        f"## The functions alone at {max(row['tokens'] for row in result['times'])} tokens",
        markdown(
            ["function", "milliseconds"], [[n, f"{ms:.4f}"] for n, ms in result["parts"].items()]
        ),
        "## Relative error against the layer in float64",
        *(
            markdown([name, *found], [["", *(f"{e:.1e}" for e in found.values())]])
            for name, found in result["errors"].items()
        ),
    ]
    for name, found in result.get("kernels", {}).items():
        total = sum(row["us"] for row in found["kernels"])
        out += [
            f"## Kernels of `{name}`, forward + backward: {total:.0f} us in all",
            markdown(
                ["us", "calls", "kernel"],
                [
                    [f"{r['us']:.1f}", f"{r['calls']:g}", f"`{r['kernel'][:90]}`"]
                    for r in found["kernels"][:24]
                ],
            ),
        ]
    return "\n\n".join(out)


def mixture_rows(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    table = []
    for name in names:
        cells = []
        for row in rows:
            side = row["sides"].get(name)
            cells.append(f"{side['ms']:.4f} ({side['ratio']:.2f}x)" if side else None)
        table.append([name, *cells])
    passes = [f"{r['tokens']}, {'fwd + bwd' if r['backward'] else 'fwd'}" for r in rows]
    return markdown(["tokens, pass", *passes], table)


def memory_rows(rows: list[dict]) -> str:
    table = []
    for name in rows[0]["sides"]:
        cells = []
        for row in rows:
            side, plain = row["sides"][name], row["sides"]["plain"]
            ratio = side["total"] / plain["total"]
            cells.append(f"{side['total']:.0f} ({ratio:.2f}x); {side['beyond']:.0f}")
        table.append([name, *cells])
    return markdown(["tokens", *(row["tokens"] for row in rows)], table)
