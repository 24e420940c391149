"""Ways to divide the F neurons of a feed-forward network into E experts of m neurons.

Pure functions of tensors, the same for the same seed. Each returns neurons_EM, a long tensor of
the neuron at each place of each expert; a network is the sum of its experts under any of them.
They know neurons and what these compute, and no router's training.
"""
