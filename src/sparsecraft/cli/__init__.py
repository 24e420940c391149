"""The command line: one file a verb, which reads its options and calls one function.

No torch until a verb runs. It knows every package, and nothing imports it.
"""
