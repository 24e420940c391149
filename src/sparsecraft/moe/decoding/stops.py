"""When a loop that generates may end, without a wait of the host at every step.

The device says it some steps late. What came after the end is taken away.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True, slots=True)
class _Note:
    """What a step left for the host: whether all sequences had ended, and its tokens (B,)."""

    length: int
    ended: Tensor
    tokens_B: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class Stops:
    """Reads what steps say `lag` of them late, and gives their tokens to a streamer.

    Attributes:
        length: where all sequences had ended; None while some go on.
    """

    def __init__(self, streamer: BaseStreamer | None, lag: int):
        self.streamer, self.lag = streamer, lag
        self.length: int | None = None
        self._notes: deque[_Note] = deque()

    def after(self, unfinished_B: Tensor, tokens_B: Tensor, length: int) -> bool:
        """Note a step behind which sequences have `length` tokens; whether to go on."""
        ended, tokens, copied = ~unfinished_B.any(), tokens_B, None
        if ended.is_cuda:
            ended, copied = ended.to("cpu", non_blocking=True), torch.cuda.Event()
            if self.streamer is not None:
                tokens = tokens_B.to("cpu", non_blocking=True)
            copied.record()
        self._notes.append(_Note(length, ended, tokens, copied))
        while self.length is None and len(self._notes) > self.lag:
            self._hear()
        return self.length is None

    def finish(self, length: int) -> int:
        """Hear the rest; how many tokens of `length` count."""
        while self.length is None and self._notes:
            self._hear()
        if self.streamer is not None:
            self.streamer.end()
        return length if self.length is None else self.length

    def _hear(self) -> None:
        note = self._notes.popleft()
        note.wait()
        if self.streamer is not None:
            self.streamer.put(note.tokens_B.cpu())
        if note.ended.item():
            self.length = note.length
