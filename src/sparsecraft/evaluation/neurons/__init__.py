"""What the neurons of dense feed-forward networks do, on what (Pochinkov, Jones and Rahman 2024).

`analyze_neurons` is the door. `statistics` counts activations in one pass, `scores` ranks neurons
for a domain, `overlaps` and `clusters` say what sets of them have in common, beside chance and a
twin, and `pruning` what the model loses without them.
"""
