"""Routers: a scorer and a selection for whole experts, a gate for parts of one network.

They turn tokens into a `Routing`, and know no experts.
"""
