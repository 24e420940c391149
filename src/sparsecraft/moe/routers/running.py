"""Running: what a model with split networks runs, as all of its gates know it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from sparsecraft.moe.extra_state import is_bool, is_number

# What older versions did not write.
NOT_IN_OLDER = {"rectified": False, "imitates": False}


@dataclass(slots=True)
class Running:
    """What a model with split networks runs. Its gates share one, which travels in their
    `state_dict`, and a checkpoint's manifest holds it.

    Attributes:
        stages: names of the stages that have been through.
        budget: share of experts that run; 1.0 is the dense function, None the recipe's own rule.
        calibration: (share, threshold) as measured, by ascending share.
        rectified: ReLU has been put into the networks.
        imitates: the networks that imitate Linears have been fitted, and run instead of them.
    """

    stages: list[str] = field(default_factory=list)
    budget: float | None = 1.0
    calibration: list[tuple[float, float]] = field(default_factory=list)
    rectified: bool = False
    imitates: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self) | {"calibration": [list(point) for point in self.calibration]}

    def read(self, data: dict[str, Any]) -> None:
        """Become what `to_dict` gave, or what older versions wrote, which had fewer fields."""
        data = NOT_IN_OLDER | data
        self.stages = list(data["stages"])
        self.budget = data["budget"]
        self.calibration = [(share, threshold) for share, threshold in data["calibration"]]
        self.rectified = data["rectified"]
        self.imitates = data["imitates"]


def is_running(data: Any) -> bool:
    """Whether `Running.read` takes it."""
    if not isinstance(data, dict):
        return False
    data = NOT_IN_OLDER | data
    if data.keys() != Running().to_dict().keys():
        return False
    budget, points, stages = data["budget"], data["calibration"], data["stages"]
    return (
        isinstance(stages, list)
        and all(isinstance(name, str) for name in stages)
        and (budget is None or (is_number(budget) and 0 < budget <= 1))
        and isinstance(points, list)
        and all(isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in points)
        and all(0 <= share <= 1 for share, _ in points)
        and all(first[0] <= second[0] for first, second in pairwise(points))
        and is_bool(data["rectified"])
        and is_bool(data["imitates"])
    )
