"""What routers did over the steps of a training run, from its log.

`series` reads the log, `page` draws it.
"""
