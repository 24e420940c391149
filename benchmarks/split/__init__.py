"""Time of a split network of which a part runs, over the dense one."""
