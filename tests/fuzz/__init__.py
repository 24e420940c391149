"""Folders and files of every kind that we read, edited at random, each read by its own process.

`folders` makes one of each kind and says how it is read; `mutations` edits one; `child` reads it
under limits and sees what it does; `__main__` does so two thousand times and prints a table.
"""
