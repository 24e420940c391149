"""Experts from several dense models of one ancestor, or from LoRAs, checked and gathered.

It knows folders of models, and neither routers nor training.
"""
