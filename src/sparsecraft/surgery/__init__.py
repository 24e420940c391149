"""Edits of one model in place: plan, build, install, revert, set the budget, fold.

It knows the model in memory, and no file, no data set and no training.
"""
