"""The folder that holds a converted model, one file here for each part of docs/format.md.

Written under a temporary name, read back, then named. It knows how a model is edited,
and not how it was converted or trained.
"""
