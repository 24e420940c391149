"""Reports as pages: one file that opens without a network, in light and dark.

`drawing` makes a figure in both, `writing` fills a template and writes the folder.
"""
