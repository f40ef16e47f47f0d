"""Texts as words, the same for every model: what statistics of texts count in.

A word is a run of characters between spaces without the punctuation around it; each punctuation mark, and
each character of a script that is written without spaces between words, is a word of its own. Words are taken
from the text alone, so that figures compare across tokenizers. Spaces and line ends are not kept.
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

# blocks of scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han
_UNSPACED = (
    r"\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
    r"\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# ASCII but _, Latin-1, Armenian, Hebrew, Arabic, Devanagari, Tibetan, Ethiopic, general, CJK and full-width
# punctuation. The letters of many scripts are joined by marks that `\w` does not hold, so what is no word is
# listed, and not what is.
_MARKS = (
    r"!-/:-@\[-^`{-~\xa1-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3"
    r"\u060c\u061b\u061f\u06d4\u0964\u0965\u0f08-\u0f14\u1361-\u1368\u2010-\u2027\u2030-\u205e\u2e00-\u2e7f"
    r"\u3001-\u3003\u3008-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_WORD = re.compile(rf"[^\s{_MARKS}{_UNSPACED}]+|\S")
_PART = 1 << 20  # characters of a text that are taken apart at once


def words_of(text: str) -> list[str]:
    """The words of `text` in order."""
    return _WORD.findall(text)


def tokens_of(texts: Sequence[Any]) -> list[Sequence[Hashable]]:
    """Each text as its words; one that is a sequence of token ids already is taken as it is."""
    return [words_of(text) if isinstance(text, str) else text for text in texts]


def words_of_parts(texts: Iterable[str | tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """The words of texts that need not fit in memory.

    Args:
        texts: whole texts, or (number of the text, part of it), the parts of a text one after the other.

    Yields:
        (number of the text, some of its words); joined, they are those of the whole text.
    """
    number, unfinished = -1, ""
    for i, item in enumerate(texts):
        text_number, text = item if isinstance(item, tuple) else (i, item)
        if text_number != number and unfinished:
            yield number, [unfinished]
            unfinished = ""
        number = text_number
        for start in range(0, len(text), _PART):
            part = unfinished + text[start : start + _PART]
            words = words_of(part)
            ends_inside = bool(words) and not part[-1].isspace()  # the next part may go on with the last word
            unfinished = words.pop() if ends_inside else ""
            if words:
                yield number, words
    if unfinished:
        yield number, [unfinished]
