"""Dense networks split into experts: loss against the share of neurons that run."""
