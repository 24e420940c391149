"""Generation by captured steps: a static cache, a decoding step without the host, a loop.

It knows transformers' `generate` and what our layers read beyond tokens, and no recipe.
"""
