"""The model before: found, loaded, and seen through one view for every family.

Where a feed-forward network, an attention or a Linear stands, and what its parts are called.
It knows nothing of experts and routers.
"""
