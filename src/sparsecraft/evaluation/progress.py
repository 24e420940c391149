"""How far a long pass over data is."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("sparsecraft")

EVERY = 10.0  # seconds between two lines


class Progress:
    """Lines that say how far it is, at most one in ten seconds."""

    def __init__(self, what: str):
        self.what, self.begun = what, time.monotonic()
        self.last = self.begun

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self.last < EVERY:
            return
        self.last, rate = now, done / (now - self.begun)
        left = (of - done) / rate
        log.info(f"{done:,} of {of:,} {self.what}, {rate:,.0f} a second, {left:.0f} s left.")
