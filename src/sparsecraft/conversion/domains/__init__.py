"""What routers start from: embeddings of domains, mean inputs, centers.

It knows data sets and frozen encoders, and no training.
"""
