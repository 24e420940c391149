"""What this study compares: mixtures of three domains, and ways to add a domain to two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DOMAINS = ("general", "math", "code")
# What is trained on all three domains: name -> recipe, and whether the three sources are in it.
MIXTURES: dict[str, tuple[Callable, bool]] = {
    "nexus": (lambda r: r.nexus(3), True),
    "linear": (lambda r: r.nexus(3, "linear"), True),
    "btx": (lambda r: r.btx(3), True),
    "bam": (lambda r: r.bam(3), True),
    "bam_shared": (lambda r: r.bam(3, kv="shared"), True),
    "btx_switch": (lambda r: r.btx(3, routing="switch"), True),
    "btx_sample": (lambda r: r.btx(3, routing="sample"), True),
    "btx_soft": (lambda r: r.btx(3, routing="soft"), True),
    "upcycling": (lambda r: r.upcycling(3), False),
    "drop_upcycling": (lambda r: r.drop_upcycling(3), False),
}
DENSE = ("mix", "average_mix")
OLD, NEW = ("general", "math"), "code"
# How the third domain comes: name -> mixture of two domains, rows of linear routers.
EXTENSIONS = {
    "nexus": ("nexus", "calibrated"),
    "linear_reset": ("linear", "reset"),
    "linear_calibrated": ("linear", "calibrated"),
    "btx_reset": ("btx", "reset"),
    "btx_calibrated": ("btx", "calibrated"),
}
# Checkpoints of one training as experts: name -> experts of four checkpoints, and whether the
# routers are trained on the experts' buckets before all else.
CHECKPOINTS = {"upit": (6, True), "upit_4": (4, True), "upit_4_random": (4, False)}


@dataclass(frozen=True)
class Sizes:
    """How much of everything, and the peak of every learning rate.

    Attributes:
        expert_steps: of a dense model on one domain, but at most two passes over it.
        mix_steps: of every mixture and every control.
        budgets: steps after an extension.
        batch: packs of a step.
        evaluation: packs of a forward pass.
        calibration: packs of new and of old data for a linear router's new row.
    """

    expert_steps: int = 120
    mix_steps: int = 150
    budgets: tuple[int, ...] = (10, 30, 100)
    batch: int = 24
    evaluation: int = 32
    calibration: int = 16
    valid_packs: int = 160
    learning_rate: float = 2e-4


TINY = Sizes(3, 3, (1, 2), 6, 4, 2, 2)
TINY_WORDS = 49_152
