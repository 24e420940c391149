"""Fewer experts, or none: merge the experts of a converted model, and say what that changes."""

from sparsecraft.merging.model import (
    MERGE_TOLERANCE,
    MergeReport,
    merge,
    read_weights,
    write_merged,
)

__all__ = ["MERGE_TOLERANCE", "MergeReport", "merge", "read_weights", "write_merged"]
