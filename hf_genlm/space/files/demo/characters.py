"""Which characters of a text each token holds, also where a character is split over several tokens."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import decoders


@dataclass(frozen=True)
class Span:
    """The fewest tokens [first, stop) that hold whole characters, and these."""

    text: str
    first: int
    stop: int


class Speller:
    """Spells the tokens of one text as they come: the texts of its spans, joined, are the decoded text.

    Byte-level tokenizers (GPT-2's and its kin) cut between bytes, so a token may end within a character.
    Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_byte_level = isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)
        self._added = tokenizer.added_tokens_decoder
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._first = 0  # token of the span that is being read
        self._text = ""

    def read(self, ids: Iterable[int]) -> Iterator[Span]:
        """The spans that end in these tokens, which follow those read before."""
        for token in ids:
            self._ids.append(token)
            is_whole = self._read_bytes(token) if self._is_byte_level else self._read_text()
            if is_whole:
                yield self._close()

    def finish(self) -> Iterator[Span]:
        """What was begun and not ended, if anything."""
        self._text += self._decoder.decode(b"", final=True)
        if self._first < len(self._ids):
            yield self._close()

    def bytes_of(self, token: int) -> bytes | None:
        """What a token of a byte-level tokenizer stands for; None: of any other, which has no bytes."""
        if token in self._added:
            return self._added[token].content.encode("utf-8")
        if not self._is_byte_level:
            return None
        written = self._tokenizer.convert_ids_to_tokens(token)
        return (
            bytes(_BYTES[character] for character in written) if written else b""
        )  # an id beyond the tokens

    def _read_bytes(self, token: int) -> bool:
        self._text += self._decoder.decode(self.bytes_of(token) or b"")
        return not self._decoder.getstate()[0]  # no bytes of an unfinished character are left

    def _read_text(self) -> bool:
        """The text that these tokens add to those just before, which decide about spaces."""
        start = max(0, self._first - _LOOK_BACK)
        before = self._decoded(self._ids[start : self._first])
        self._text = self._decoded(self._ids[start:])[len(before) :]
        return not self._text.endswith("\ufffd") or len(self._ids) - self._first >= _LONGEST_CHARACTER

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _close(self) -> Span:
        span = Span(self._text, self._first, len(self._ids))
        self._first, self._text = span.stop, ""
        return span


def spell(tokenizer: Any, ids: list[int]) -> list[Span]:
    """All spans of a whole text."""
    speller = Speller(tokenizer)
    return [*speller.read(ids), *speller.finish()]


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte, and the byte (Radford et al., 2019):
    itself where it is printed and no space, else the next one from U+0100 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_LOOK_BACK = 8  # tokens
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens
