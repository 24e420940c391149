"""The page of pesc_layer.py: tables from its result."""

from __future__ import annotations

import json

from report import markdown


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
