"""The layer and its parts: routing, routers, experts, places, losses and cost.

`layer.MoELayer` puts a router and a bank of experts where a dense module stood.
It knows no file, no data set and no method by name.
"""
