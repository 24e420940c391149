"""Benchmarks: a folder a study, and `lab/`, which they share. README.md is the index."""
