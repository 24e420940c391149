"""The page of this study: tables and plots from its results."""

from __future__ import annotations

import functools
import itertools
import math
import statistics

from benchmarks.lab.queue import read
from benchmarks.lab.tables import f, insert, markdown, mean, percent
from benchmarks.lab.through_train import section
from benchmarks.splitting.arms import ARMS, NATURAL, SHARES, TRAININGS

f3 = functools.partial(f, digits=3)

RISES = (0.02, 0.05)
ORDER = [(arm, training) for arm, about in ARMS.items() for training in about.trainings]
# Okabe and Ito's colors, told apart with any eyes; markers and dashes differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
MARKERS = "osD^vPX*"
DASHES = ("-", "--")
# What the plots show: (arm, training, curve, its name there).
LEFT = (
    ("d2dmoe", "hoyer_1e-3", "d2dmoe", "D2DMoE (ReLU, Hoyer 1e-3)"),
    ("d2dmoe", "hoyer_1e-3", "dsti", "DSTI (ReLU, Hoyer 1e-3)"),
    ("moefication", "relu", "moefication", "MoEfication (ReLU)"),
    ("gmoefication", "dense", "gmoefication", "G-MoEfication (SiLU)"),
    ("d2dmoe_soft", "dense", "d2dmoe", "D2DMoE's router (SiLU, means)"),
    ("moefication_soft", "dense", "moefication", "MoEfication (SiLU, no means)"),
    ("cmoe16", "dense", "cmoe", "CMoE, 16 (SiLU)"),
    ("cmoe_tuned", "cmoe", "cmoe", "CMoE, 16, tuned"),
)
BANKS = (("d2dmoe", "hoyer_1e-3", "d2dmoe"), ("gmoefication", "dense", "gmoefication"))
NAMES = {
    "oracle": "oracle",
    "random_oracle": "random partition, oracle",
    "similarity": "similarity",
}


# ------------------------------------------------------------------ numbers
def arms_in(rows: list[dict]) -> dict[tuple, dict[int, dict]]:
    """(arm, training) -> seed -> row, in the order of arms.py."""
    found: dict[tuple, dict[int, dict]] = {key: {} for key in ORDER}
    for row in rows:
        if row["kind"] == "arm":
            found[row["arm"], row["training"]][row["seed"]] = row
    return {key: seeds for key, seeds in found.items() if seeds}


def points(row: dict, label: str, y: str = "loss", x: str = "share") -> list[tuple[float, float]]:
    """(share, value) of a curve by ascending share, the whole network last; the recipe's own rule,
    which has no budget, is left out."""
    found = {p[x]: p[y] for p in row["curves"][label] if y in p and p["budget"] != NATURAL}
    return [*sorted(found.items()), (1.0, row["whole"][y])]


def at(curve: list[tuple[float, float]], share: float) -> float | None:
    """The value at a share, on the line between the points beside it; None outside."""
    if curve[0][0] > share + 0.011:
        return None
    for (low, below), (high, above) in itertools.pairwise(curve):
        if low - 0.011 <= share <= high:
            if high == low:
                return below
            return below + (above - below) * max(0.0, share - low) / (high - low)
    return curve[-1][1]


def least_share(curve: list[tuple[float, float]], limit: float | None) -> float | None:
    """The smallest share from which on, up to all, the loss stays at `limit` or below."""
    if limit is None or curve[-1][1] > limit:
        return None
    share = curve[-1][0]
    for (low, below), (high, above) in reversed(list(itertools.pairwise(curve))):
        if below > limit:
            return high - (high - low) * (limit - above) / max(below - above, 1e-9)
        share = low
    return share


def control(arms: dict) -> float | None:
    """Loss of the dense control, mean over seeds: any arm of the training `dense`, all of it."""
    for (_, training), seeds in arms.items():
        if training == "dense":
            return statistics.mean(row["whole"]["loss"] for row in seeds.values())
    return None


# ------------------------------------------------------------------ tables
def training_table(rows: list[dict], arms: dict) -> str:
    found = []
    base = control(arms)
    for name, about in TRAININGS.items():
        own = {seed: row for (_, training), seeds in arms.items() if training == name
               for seed, row in seeds.items()}  # fmt: skip
        if not own:
            continue
        whole = [row["whole"] for row in own.values()]
        loss = statistics.mean(w["loss"] for w in whole)
        found.append([
            name, about.about, "-" if own[min(own)]["lr"] is None else f"{own[min(own)]['lr']:g}",
            f3(loss), f"{math.exp(loss):.2f}", None if base is None else f"{loss / base - 1:+.1%}",
            *(f3(statistics.mean(w[d] for w in whole)) for d in ("general", "math", "code")),
            " / ".join(f(w["loss"]) for w in whole),
        ])  # fmt: skip
    header = ["training", "what", "LR", "**loss**", "perplexity", "to the dense control", "general",
              "math", "code", "by seed"]  # fmt: skip
    return markdown(header, found)


def search_table(rows: list[dict]) -> str:
    tried: dict[str, list] = {}
    for row in rows:
        if row["kind"] == "search":
            tried.setdefault(row["training"], []).append((row["lr"], row["objective"]))
    return markdown(
        ["training", "LR: what the first stage minimizes, on text apart"],
        [[n, ", ".join(f"{lr:.3g}: {v:.4f}" for lr, v in sorted(own))] for n, own in tried.items()],
    )


def curve_table(arms: dict) -> str:
    """Loss at shares, on the line between measured points; means over seeds."""
    found = []
    for (arm, training), seeds in arms.items():
        labels = list(dict.fromkeys(label for row in seeds.values() for label in row["curves"]))
        for label in labels:
            own = [points(row, label) for row in seeds.values() if label in row["curves"]]
            cells = [f3(mean([at(c, share) for c in own])) for share in SHARES]
            half = [at(c, 0.5) for c in own]
            spread = f3(max(half) - min(half)) if len(own) > 1 and None not in half else None
            experts = seeds[min(seeds)]["experts"]
            found.append([training, f"{arm} ({experts})", NAMES.get(label, f"**{label}**"),
                          *cells, f3(mean([c[-1][1] for c in own])), len(own), spread])  # fmt: skip
    header = ["weights", "experts", "router", *(f"{s:.0%}" for s in SHARES), "100%", "seeds",
              "between seeds at 50%"]  # fmt: skip
    return markdown(header, found)


def rise_table(arms: dict) -> str:
    """The smallest share of neurons (of FLOPs of the split networks, router counted) at which the
    loss is still within 2 % and 5 %."""
    base, found = control(arms), []
    for (arm, training), seeds in arms.items():
        for label in seeds[min(seeds)]["curves"]:
            own = [r for r in seeds.values() if label in r["curves"]]
            cells = []
            for reference in ("own", "control"):
                for rise in RISES:
                    pair = []
                    for x in ("share", "flops"):
                        limits = [(1 + rise) * ref if (ref := r["whole"]["loss"]
                                  if reference == "own" else base) else None
                                  for r in own]  # fmt: skip
                        curves = [points(r, label, x=x) for r in own]
                        pair.append(mean([least_share(c, limit) for c, limit in
                                          zip(curves, limits, strict=True)]))  # fmt: skip
                    saves = label not in ("oracle", "random_oracle")
                    text = percent(pair[0])
                    cells.append(f"{text} ({percent(pair[1])})" if text and saves else text)
            found.append([training, arm, NAMES.get(label, f"**{label}**"), *cells])
    header = ["weights", "experts", "router", "+2 % of its own", "+5 % of its own",
              "+2 % of the dense control", "+5 % of the dense control"]  # fmt: skip
    return markdown(header, found)


def natural_table(arms: dict) -> str:
    """What the recipes' own thresholds run, nothing calibrated."""
    found = []
    for (arm, training), seeds in arms.items():
        for label in seeds[min(seeds)]["curves"]:
            own = [p for row in seeds.values() for p in row["curves"].get(label, ())
                   if p["budget"] == NATURAL]  # fmt: skip
            if own:
                found.append([training, arm, label, *(
                    f3(statistics.mean(p[k] for p in own)) for k in
                    ("share", "least", "most", "flops", "loss"))])  # fmt: skip
    header = ["weights", "experts", "router", "share of the neurons", "least of a layer",
              "most of a layer", "share of the FLOPs", "loss"]  # fmt: skip
    return markdown(header, found)


def mass_table(named: list[tuple[str, dict]]) -> str:
    found = []
    for name, row in named:
        for share, m in row["masses"].items():
            cells = [f3(m[k]) for k in ("oracle", "router", "similarity", "chance")]
            holds = m["oracle"] >= m["router"] >= m["similarity"] >= m["chance"]
            found.append([name, f"{float(share):.0%}", *cells, "yes" if holds else "NO",
                          f"{m['ordered']} of {m['layers']}"])  # fmt: skip
    header = ["experts", "of them", "oracle", "router", "similarity", "chance",
              "in this order, on average", "in layers"]  # fmt: skip
    return markdown(header, found)


def encoder_table(rows: list[dict]) -> str:
    """Measured points alone, each under the share that it is nearest to."""
    columns, found = (0.02, *SHARES), []

    def cell(p: dict) -> str:
        return f"{100 * p['accuracy']:.0f}, {100 * p['dense_head']:.0f} ({p['cosine']:.2f})"

    for row in rows:
        for label, curve in row.get("curves", {}).items():
            own = {min(columns, key=lambda c, p=p: abs(c - p["share"])): cell(p)
                   for p in curve if "share" in p and p["budget"] != NATURAL}  # fmt: skip
            found.append([f"{row['arm']} ({row['experts']})", NAMES.get(label, f"**{label}**"),
                          *(own.get(c) for c in columns), cell(row["whole"])])  # fmt: skip
    return markdown(["experts", "router", *(f"{c:.0%}" for c in columns), "100%"], found)


def encoder_rise_table(rows: list[dict], dense: float) -> str:
    """The smallest share of neurons (of FLOPs, router counted) from which on, up to all, the dense
    model's own regression is right at most 2 % and 5 % less often: than with all experts of the
    row on, and than on the dense model's embeddings."""
    found = []
    for row in rows:
        for label in row.get("curves", {}):
            cells = []
            for reference in (row["whole"]["dense_head"], dense):
                for rise in RISES:
                    pair = []
                    for x in ("share", "flops"):
                        curve = [(at, -y) for at, y in points(row, label, "dense_head", x)]
                        pair.append(percent(least_share(curve, -(1 - rise) * reference)))
                    saves = pair[0] and label not in ("oracle", "random_oracle")
                    cells.append(f"{pair[0]} ({pair[1]})" if saves else pair[0])
            found.append([row["arm"], NAMES.get(label, f"**{label}**"), *cells])
    header = ["experts", "router", "-2 % of its own", "-5 % of its own",
              "-2 % of the dense model's", "-5 % of the dense model's"]  # fmt: skip
    return markdown(header, found)


def speed_table(rows: list[dict]) -> str:
    """Medians of f3; each beside the mean of the dense model's two runs on the same device."""
    found = []
    for row in rows:
        base = {way: mean([r[way]["tokens_per_s"] for r in rows if r["model"] == "dense"
                           and r["device"] == row["device"] and way in r])
                for way in ("generate", "graph")}  # fmt: skip
        cells = []
        for way in ("generate", "graph"):
            if way not in row:
                cells += [f"{way} failed" if f"{way}_failed" in row else None] * 2
                continue
            value = row[way]["tokens_per_s"]
            cells += [f"{value:.1f}", f"{value / base[way]:.2f}" if base[way] else None]
        name = "own rule" if row["budget"] is None else f"{row['budget']:g}"
        found.append([row["device"], row["dtype"], row["model"], name, f3(row.get("share")), *cells,
                      f3(row["quality"]["loss"])])  # fmt: skip
    header = ["machine", "dtype", "model", "budget", "share, new tokens", "generate, tokens/s",
              "to dense", "CUDA graph, tokens/s", "to dense", "validation loss"]  # fmt: skip
    return markdown(header, found)


def _dense_accuracy(rows: list[dict]) -> float:
    """Of the dense model's own regression; an untouched model with all experts on is that model."""
    known = {row["arm"]: row["whole"]["dense_head"] for row in rows}
    return known.get("dense", statistics.median(known.values()))


# ------------------------------------------------------------------ plots
Curve = list[tuple[float, float]]


def _panels(
    panels: dict[str, dict[str, Curve]], columns: int, base: tuple[str, float] | None, path
) -> None:
    """One panel for each title, with a line and a marker of its own for each curve's name.

    Args:
        base: what a dotted line across all of them is, and where.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    size = 6.4 * columns, 4.2 * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for number, (name, curve) in enumerate(curves.items()):
            axis.plot(
                *zip(*curve, strict=True), DASHES[number // len(COLORS)], label=name,
                color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)],
                markersize=5, linewidth=1.6,
            )  # fmt: skip
        if base is not None:
            axis.axhline(base[1], color="0.5", linewidth=1, linestyle=":", label=base[0])
            axis.set_ylim(base[1] - 0.05, base[1] + 1.2)
        axis.set(title=title, xlabel="share of the FFN neurons", xlim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, handlelength=3.5)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        measure = "loss, nats per token" if base is not None else "accuracy"
        axis.set_ylabel(f"validation {measure}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_losses(arms: dict, path) -> None:
    lte = [("lte", t, "lte", f"LTE ({TRAININGS[t].about})") for a, t in arms if a == "lte"]
    panels: dict[str, dict[str, Curve]] = {}
    for title, asked in (("recipes", LEFT), ("LTE", lte)):
        for arm, training, label, name in asked:
            row = arms.get((arm, training), {}).get(0)
            if row and label in row["curves"]:
                panels.setdefault(title, {})[name] = points(row, label)
    for arm, training, own in BANKS:
        row = arms.get((arm, training), {}).get(0)
        for label in (own, "oracle", "random_oracle", "similarity"):
            if row and label in row["curves"]:
                title = f"what the router and the partition of {arm} lose"
                panels.setdefault(title, {})[NAMES.get(label, "router")] = points(row, label)
    base = control(arms)
    _panels(panels, 2, None if base is None else ("dense control", base), path)


def plot_encoder(rows: list[dict], path) -> None:
    panels: dict[str, dict[str, Curve]] = {}
    for row in rows:
        for label in row.get("curves", {}):
            name = NAMES.get(label, f"router of {label}")
            panels.setdefault(row["arm"], {})[name] = points(row, label, "dense_head")
    _panels(panels, 3, None, path)


# ------------------------------------------------------------------ the page
def write(args) -> None:
    rows = read(args.results)
    arms = arms_in(rows)
    encoder = [row for row in rows if row["kind"] == "encoder"]
    speed = [row for row in rows if row["kind"] == "speed"]
    parts = []
    if arms:
        first = next(iter(next(iter(arms.values())).values()))
        sizes = first["sizes"]
        tokens = sizes["steps"] * sizes["batch"] * 512
        parts += [
            f"{first['machine']}, torch {first['torch']}. Gradient stages: {sizes['steps']} steps "
            f"of {sizes['batch'] * 512} tokens, {tokens / 1e6:.2f} M in all, for every recipe; "
            f"routers: {sizes['fit_tokens']} tokens.",
            "### Weights, all experts on", training_table(rows, arms),
            "### Learning rates tried", search_table(rows),
            "### Loss against the share of neurons", "![](smollm2.png)", curve_table(arms),
            "### Share of neurons (of FLOPs, router counted) within 2 % and 5 %", rise_table(arms),
            "### The recipes' own rules", natural_table(arms),
            "### Captured mass",
            mass_table([(f"{arm}, {training}", seeds[min(seeds)])
                        for (arm, training), seeds in arms.items()]),
        ]  # fmt: skip
        plot_losses(arms, args.page.with_name("smollm2.png"))
    if any("curves" in row for row in encoder):
        parts += [
            "### MiniLM: accuracy in percent of a regression fitted anew, of the dense model's own "
            "(cosine to the dense embedding)",
        ]
        settings = {row["train_texts"]: row for row in encoder}
        for count, about in sorted(settings.items(), reverse=True):
            own = [row for row in encoder if row["train_texts"] == count]
            parts += [
                f"{about['sources']} sources, {count} texts to train the regression and "
                f"{about['test_texts']} to test it, {about['length']} tokens at most; on a "
                f"{about['machine']}.",
                *(["![](minilm.png)"] if count == max(settings) else []),
                encoder_table(own), encoder_rise_table(own, _dense_accuracy(own)),
                mass_table([(row["arm"], row) for row in own if "masses" in row]),
            ]  # fmt: skip
            if count == max(settings):
                plot_encoder(own, args.page.with_name("minilm.png"))
    if speed:
        parts += ["### Generation, greedy, one sequence", speed_table(speed)]
    failed = [row for row in rows if row["kind"] == "failed"]
    if failed:
        names = sorted({f"{row.get('arm', '')} {row['training']}".strip() for row in failed})
        parts += [f"Failed: {', '.join(names)}."]
    insert(args.page, "\n\n".join(parts))
    section(args.page)
    print(args.page)
