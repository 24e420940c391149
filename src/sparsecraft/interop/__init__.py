"""Other libraries' formats: exports, imports, PEFT, and transformers' Auto classes.

A format is refused with the reason where it does not hold the model exactly.
It knows no training.
"""
