"""Products of a few tensors, each equal to a plain loop beside it; they know no module."""
