"""Time and memory of conversions and exports, and of partitions of neurons."""
