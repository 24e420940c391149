"""Experts of three domains joined, and a domain added later: BTX, Nexus, BAM, their baselines."""
