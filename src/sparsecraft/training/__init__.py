"""The stages of a recipe, run on data: trained by gradient, or fitted to captured inputs.

Rides on transformers' and TRL's trainers. It knows converted models, and not how they were made.
"""
