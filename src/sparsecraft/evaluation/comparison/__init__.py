"""Several models beside each other: what each loses on the same rows, and what it costs.

`compare` is the door. `measuring` loads one model at a time and frees it, `intervals` says how far
differences of losses would move on other documents, and `page` shows all of it.
"""
