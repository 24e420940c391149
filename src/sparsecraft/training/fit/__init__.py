"""Routers of split networks fitted to captured inputs, all layers at once.

It knows the inputs of the dense networks, and no loss of a language model.
"""
