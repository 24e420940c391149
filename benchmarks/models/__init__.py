"""Whole models: tokens per second beside the dense model, and beside transformers' own."""
