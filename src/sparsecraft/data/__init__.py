"""Rows to batches: text, chats and labels, encoded, mixed by weight, padded.

What is left out of a row or a file is counted and named.
It knows tokenizers and the masks that layers read, and no training.
"""
