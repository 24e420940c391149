"""Dense to mixture of experts, and back: convert, stream, extend, merge.

The story above `sparsecraft.surgery`: where experts come from, what routers start from, and the
certificate. It knows no training.
"""
