"""How much of a split model runs, and what that costs: calibration, sweeps, latency, plots.

It knows models whose networks are split, and leaves them as they were.
"""
