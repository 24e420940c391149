"""Where in the text of a chat the assistant speaks, from few renderings of its template.

A span begins after the header that invites an answer and ends with the token that ends the turn:
what the model writes. What a prefix of the chat renders to says so exactly, and costs a rendering
of the whole history for each turn. So it is asked once for each kind of turn; the other turns are
found by the header and the closing that this showed, and where they do not fit, asked as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsecraft.data.chat import render, squeezed
from sparsecraft.errors import DataError

SPACE = re.compile(r"\s*")
# Tags of thoughts without any: some templates write them before an answer, or invite one by them,
# and leave them out of earlier turns.
THOUGHT = re.compile(
    r"\s*<[^<>|\uff5c]*think[^<>|\uff5c]*>.*?</[^<>|\uff5c]*think[^<>|\uff5c]*>\s*", re.DOTALL
)
EMPTY_THOUGHT = re.compile(r"\s*(?:<[^<>|\uff5c]*think[^<>|\uff5c]*>\s*)+")
INVITED_THOUGHT = re.compile(r"(?:<[^<>|\uff5c]*think[^<>|\uff5c]*>\s*)+$")


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the answers of one kind of turn: before them the `header`, from what the
    turn before says onwards, and words of the turn's own, `lead`; at their end the `closing`, which
    stands `ends` times within."""

    header: str
    lead: str
    closing: str
    ends: int


@dataclass(slots=True)
class Spans:
    """The assistant's turns within the text of a chat.

    Attributes:
        messages: as the template reads them.
        text: what it makes of all of them.
        given: what it gets beside them.
    """

    messages: list[dict]
    text: str
    tokenizer: Any
    given: dict[str, Any]

    def find(self) -> list[tuple[int, int]]:
        """(start, end) of every assistant turn, in characters.

        Raises:
            DataError: the template rewrites a turn, so that no span is certain.
        """
        frames: dict[tuple, Frame] = {}
        spans, at, last = [], 0, -1
        for turn, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            speaker = self.messages[turn - 1]["role"] if turn else ""
            kind = (turn == len(self.messages) - 1, speaker, *sorted(set(message) - {"content"}))
            at = self._after(at, self.messages[last + 1 : turn])
            span = self._framed(at, message, frames[kind]) if kind in frames else None
            if span is None:
                span, frames[kind] = self._asked(at, turn)
            spans.append(span)
            at, last = span[1], turn
        return spans

    def _after(self, at: int, messages: list[dict]) -> int:
        """The place after what others say, so that no header that they quote is taken for one."""
        for message in messages:
            content = message["content"].strip()
            found = self.text.find(content, at)
            at = found + len(content) if found >= 0 else at
        return at

    # -------------------------------------------------------------- by header and closing
    def _framed(self, at: int, message: dict, frame: Frame) -> tuple[int, int] | None:
        """The next turn of a kind that is known, or None where it does not look as expected."""
        start = self.text.find(frame.header, at)
        if start < 0 or not frame.header:
            return None
        start += len(frame.header)
        body = message["content"].strip()
        if set(message) == {"role", "content"}:
            led = self.text.startswith(frame.lead, start)
            firsts = [start + len(frame.lead) * led, *self._firsts(start)]
            first = next((p for p in firsts if self.text.startswith(body, p)), None)
            if first is None:
                return None
            end = first + len(body)
            if frame.closing.strip():
                end = SPACE.match(self.text, end).end()
            closing = frame.closing.lstrip() or frame.closing
            return (start, end + len(closing)) if self.text.startswith(closing, end) else None
        end = start
        for _ in range(frame.ends if frame.closing.strip() else 0):
            found = self.text.find(frame.closing.strip(), end)
            if found < 0:
                return None
            end = found + len(frame.closing.strip())
        return (start, end) if end > start and body in self.text[start:end] else None

    # -------------------------------------------------------------- by what a prefix renders to
    def _asked(self, at: int, turn: int) -> tuple[tuple[int, int], Frame]:
        """The span of a turn from what the chat up to it renders to, and its frame."""
        text, body = self.text, self.messages[turn]["content"].strip()
        upto = render(self.messages[: turn + 1], self.tokenizer, given=self.given)
        start, header, begins = self._start(at, turn)
        end = len(upto)
        if not (text.startswith(upto) and end > start):
            # Some templates write a block before the last answer only (Qwen3's <think>), or close
            # it otherwise: look for the answer. One that rewrites the answer itself is refused.
            end = self._end(body, upto[begins:], start)
            if end is None:
                raise DataError(_rewritten(turn, upto, text))
        # Templates put a newline after the end-of-turn token; generation stops before it.
        spoken = text[start:end].rstrip()
        marker = next((m for m in self._markers() if spoken.endswith(m)), "")
        if marker:
            end = start + len(spoken)
        if squeezed(body) not in squeezed(text[start:end]):
            raise DataError(
                f"the chat template changes the answer in message {turn + 1} ({body[:30]!r} "
                f"becomes {text[start:end][:30]!r}), and would train on what the row does not say"
            )
        place = text.rfind(body, start, end - len(marker))
        bare = set(self.messages[turn]) == {"role", "content"} and place >= 0
        closing = text[place + len(body) : end] if bare else marker
        ends = text.count(closing.strip(), start, end) if closing.strip() else 0
        lead = text[start:place] if bare else ""
        return (start, end), Frame(header, lead, closing, ends)

    def _start(self, at: int, turn: int) -> tuple[int, str, int]:
        """Where the answer begins, after the header that is written to invite it; this header; and
        where the answer begins in what the chat up to it renders to."""
        before = self._tried(self.messages[:turn], generate=True)
        if before is not None:
            if not self.text.startswith(before):
                before = INVITED_THOUGHT.sub("", before)
            said = self.messages[turn - 1]["content"].strip()
            header = before[before.rfind(said) + len(said) :] if said in before else ""
            if self.text.startswith(before):
                return len(before), header, len(before)
            # Earlier turns are written otherwise while this one is the last.
            found = self.text.find(header, at) if header.strip() else -1
            if found < 0:
                raise DataError(_rewritten(turn, before, self.text))
            return found + len(header), header, len(before)
        header = ""
        later = [n for n, m in enumerate(self.messages, 1) if n > turn and m["role"] != "assistant"]
        for stop in (*later[:1], len(self.messages)):
            part = self.messages[:stop]
            header = header or _added(self._tried(part), self._tried(part, generate=True))
        header = INVITED_THOUGHT.sub("", header)
        found = self.text.find(header, at) if header.strip() else -1
        if found < 0:
            raise DataError(
                f"the answer in message {turn + 1} cannot be found: the chat template does not "
                "render what stands before it alone, and writes no header for answers"
            )
        return found + len(header), header, found + len(header)

    def _tried(self, messages: list[dict], generate: bool = False) -> str | None:
        """The text of a part of the chat; None where its template takes the whole only."""
        try:
            return render(messages, self.tokenizer, generate, self.given) if messages else None
        except DataError:
            return None

    def _end(self, body: str, last: str, start: int) -> int | None:
        """The end of an answer that renders to `last` where it is, and begins at `start`: after
        the same words or some of them, and closed in the same way or by another token."""
        markers = self._markers()
        tokens = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        if not body:  # a call of tools, of which the same holds
            last = last[found.end() :] if (found := THOUGHT.match(last)) else last
            return start + len(last) if self.text.startswith(last, start) else None
        at = last.find(body)
        while at >= 0:
            lead, tail = last[:at], last[at + len(body) :]
            leads = [lead, *(lead[token.start() :] for token in tokens.finditer(lead))]
            places = [start + len(words) for words in leads if self.text.startswith(words, start)]
            for place in (*places, *self._firsts(start)):
                if not self.text.startswith(body, place):
                    continue
                end = place + len(body)
                if self.text.startswith(tail, end):
                    return end + len(tail)
                if token := tokens.match(self.text, SPACE.match(self.text, end).end()):
                    return token.end()
            at = last.find(body, at + 1)
        return None

    def _firsts(self, start: int) -> list[int]:
        """Where an answer may begin after its header: at once, after blanks, after no thought."""
        found = [start, SPACE.match(self.text, start).end()]
        thought = EMPTY_THOUGHT.match(self.text, start)
        return [*found, thought.end()] if thought else found

    def _markers(self) -> list[str]:
        tokens = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        return sorted(tokens, key=len, reverse=True)


def _added(text: str | None, longer: str | None) -> str:
    """What `longer` has after `text`, nothing where it is something else."""
    if text is None or longer is None or not longer.startswith(text):
        return ""
    return longer[len(text) :]


def _rewritten(turn: int, part: str, text: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), len(text))
    return (
        f"the chat template renders message {turn + 1} differently within the whole chat "
        f"({part[same : same + 30]!r} becomes {text[same : same + 30]!r}), so its tokens cannot "
        "be found; split the row into one row per answer, or use a template that keeps all turns"
    )
