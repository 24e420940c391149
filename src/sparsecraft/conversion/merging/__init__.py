"""Fewer experts, or none: experts merged into dense weights, and what that changes.

It measures the change on data, and refuses what has no dense form.
"""
