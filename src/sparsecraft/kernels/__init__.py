"""Products of tensors, each beside the plain loop that it equals.

Grouped, batched and merged products, and Triton kernels for tokens that use a few experts.
They know tensors only: no module, no router, no recipe. What runs when is the choice of
`sparsecraft.moe.experts.dispatch` and `sparsecraft.moe.fusions`.
"""
