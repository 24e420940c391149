"""What a model does: its distance from the dense one, held-out loss, choices, routing, reports.

It measures any model, converted or not, and changes none.
"""
