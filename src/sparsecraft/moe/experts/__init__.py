"""Banks of experts, one file a kind; a kind writes `expert(e, x)` and inherits its dispatch.

`base` says what may be asked of any bank, `dispatch` which way it runs.
A bank knows the module that it was made from, and no router.
"""
