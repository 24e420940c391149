"""Experts that join a trained mixture later, and experts that leave it.

The logits of the other experts keep their bits. It knows no training.
"""
