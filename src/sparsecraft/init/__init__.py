"""Ways to divide the F neurons of a feed-forward network into E experts of m neurons.

Pure functions of tensors, the same for the same seed. Each returns neurons_EM, a long tensor of
the neuron at each place of each expert; a network is the sum of its experts under any of them.
"""

from sparsecraft.init.activation import (
    activation_clusters,
    activation_markers,
    domain_masks,
    domain_neurons,
)
from sparsecraft.init.auction import balanced_assignment
from sparsecraft.init.balanced import balanced_kmeans, inertia
from sparsecraft.init.graph import (
    check_metis,
    co_activation,
    co_activation_weights,
    cut_graph,
)
from sparsecraft.init.partition import contiguous, labels_of, neurons_of, random_partition

__all__ = [
    "activation_clusters",
    "activation_markers",
    "balanced_assignment",
    "balanced_kmeans",
    "check_metis",
    "co_activation",
    "co_activation_weights",
    "contiguous",
    "cut_graph",
    "domain_masks",
    "domain_neurons",
    "inertia",
    "labels_of",
    "neurons_of",
    "random_partition",
]
