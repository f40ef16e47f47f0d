"""Replace personal data and secrets in a text by the name of their type, as `<EMAIL>` or `<SECRET>`.

A placeholder is plain text: the tokenizer learns it like any frequent word, and the model needs no special
token. `corpus.scrub` chooses among DETECTORS; each finds the spans of its type in a text.
"""

import bisect
import functools
import importlib
import importlib.util
import ipaddress
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import (
    BEGIN_OF_PRIVATE_KEY,
    END_OF_PRIVATE_KEY,
    GITHUB_FINE_GRAINED,
    GOOGLE,
    HUB,
    UserError,
    install_command,
)

ALL = "all"
Span = tuple[int, int]  # of characters
Finder = Callable[[str, CorpusRecipe], Iterable[Span]]


@dataclass
class Tally:
    """Counts of replacements by type, and of the documents that had any."""

    types: Counter[str] = field(default_factory=Counter)
    documents: int = 0

    def update(self, other: "Tally") -> None:
        """Add the counts of `other`."""
        self.types += other.types
        self.documents += other.documents


class Scrubber:
    """Replaces what the detectors of `recipe.scrub` find.

    A long document is searched in pieces of `piece_length` characters, so that memory is bounded; a piece
    ends at a line end among its last `max_lookback` characters, if there is one.

    Raises:
        UserError: see `check_scrubbing`.
    """

    def __init__(self, recipe: CorpusRecipe, piece_length: int = 1 << 20, max_lookback: int = 1 << 16):
        check_scrubbing(recipe)
        self.recipe, self.piece_length, self.max_lookback = recipe, piece_length, max_lookback
        self.types = _types_of(recipe)

    def scrub(self, text: str, tally: Tally | None = None) -> str:
        """`text` with placeholders. Overlapping spans become one placeholder, of the type that comes first in
        DETECTORS."""
        found = sorted(
            (*span, rank)
            for rank, name in enumerate(self.types)
            for span in DETECTORS[name](text, self.recipe)
        )
        parts, end = [], 0
        for start, stop, rank in _merged(found):
            parts += [text[end:start], f"<{self.types[rank].upper()}>"]
            end = stop
            if tally is not None:
                tally.types[self.types[rank]] += 1
        return "".join([*parts, text[end:]])

    def scrub_parts(self, parts: Iterable[str], tally: Tally | None = None) -> Iterator[str]:
        """Scrub the document that `parts` join to, in bounded memory; the result does not depend on how it is
        cut into parts."""
        of_document = Tally()
        begun: list[str] = []
        size = 0
        for part in parts:
            begun.append(part)
            size += len(part)
            if size >= self.piece_length:
                text = "".join(begun)
                while len(text) >= self.piece_length:
                    border = self._border(text[: self.piece_length])
                    yield self.scrub(text[:border], of_document)
                    text = text[border:]
                begun, size = [text], len(text)
        yield self.scrub("".join(begun), of_document)
        of_document.documents = int(of_document.types.total() > 0)
        if tally is not None:
            tally.update(of_document)

    def _border(self, piece: str) -> int:
        """Behind the last line end, and before a private key that has begun; the end if neither is near."""
        near = len(piece) - self.max_lookback
        border = piece.rfind("\n", near) + 1 or len(piece)
        key = piece.find("-----BEGIN ", max(near, piece.rfind("-----END ", near, border)), border)
        return key if key > 0 else border

    def to_json(self, tally: Tally | None) -> dict[str, Any]:
        """Value of `scrubbed` in corpus.json; no counts if nothing was counted."""
        libraries = [LIBRARIES[name][1] for name in self.types if name in LIBRARIES]
        return {
            "types": {name: None if tally is None else tally.types[name] for name in self.types},
            "documents": None if tally is None else tally.documents,
            "splits": ["train", "validation"],
            "phone_regions": list(self.recipe.phone_regions),
            "libraries": {name: metadata.version(name) for name in libraries},
        }


def scrubber_of(recipe: CorpusRecipe) -> Scrubber | None:
    """Scrubber of a recipe; None if it removes nothing."""
    return Scrubber(recipe) if recipe.scrub else None


def check_scrubbing(recipe: CorpusRecipe) -> None:
    """
    Raises:
        UserError: a region is unknown, or a library is not installed.
    """
    for name in _types_of(recipe):
        if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name][0]) is None:
            raise UserError(
                f"corpus.scrub = {name} needs the library {LIBRARIES[name][1]}: name the other types, or "
                + install_command("privacy")
            )
    if not recipe.phone_regions:
        return
    if "phone" not in _types_of(recipe):
        raise UserError("corpus.phone_regions is for corpus.scrub = phone: add it, or leave the regions out")
    from phonenumbers import SUPPORTED_REGIONS

    for region in recipe.phone_regions:
        if region not in SUPPORTED_REGIONS:
            raise UserError(
                f"corpus.phone_regions has {region!r}, no region that phonenumbers knows: name it by ISO "
                "3166 in capital letters, such as DE or US"
            )


def _types_of(recipe: CorpusRecipe) -> list[str]:
    """Types to replace, in the order of DETECTORS."""
    return [name for name in DETECTORS if name in recipe.scrub or ALL in recipe.scrub]


def _merged(found: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, rank) of sorted spans; overlapping ones as one span with the least rank."""
    begun: tuple[int, int, int] | None = None
    for start, stop, rank in found:
        if begun is not None and start < begun[1]:
            begun = begun[0], max(begun[1], stop), min(begun[2], rank)
            continue
        if begun is not None:
            yield begun
        begun = start, stop, rank
    if begun is not None:
        yield begun


# detectors

_LOCAL = re.compile(r"\w[\w.%+-]*(?:'[\w.%+-]+)*")
_MAX_LOCAL = 128  # characters before the @: twice of what RFC 5321 allows
# behind the @: labels, and a last one of letters (or xn--, in punycode)
_DOMAIN = re.compile(
    r"@(?:[^\W_](?:[\w-]{0,62})\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,63})(?![\w@])", re.IGNORECASE
)

# a pattern that begins with a character is searched many times as fast as one that begins with a lookbehind:
# so the lookbehind follows the first character
_IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.\w)")
# RFC 4291 and IANA: global unicast addresses begin with 2 or 3
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])")

_CARD_CANDIDATE = re.compile(r"[0-9](?<!\w.)(?:[ -]?[0-9]){11,}")
# a card number is not grouped, or grouped by one kind of separator
CARDS = [
    re.compile(rf"(?<!\w)(?<![0-9][.-]){digits}(?!\w|[.-][0-9])")
    for digits in (
        "[0-9]{12,19}",
        r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}",
        r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}\1[0-9]{3}",
        r"[0-9]{4}([ -])[0-9]{6}\1[0-9]{4,5}",
    )
]
# issuers of ISO/IEC 7812: (first and last prefix of their cards, lengths)
ISSUERS = (
    ("4", "4", (13, 16, 19)),  # Visa
    ("51", "55", (16,)),  # Mastercard
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),  # American Express
    ("37", "37", (15,)),
    ("6011", "6011", (16, 17, 18, 19)),  # Discover
    ("644", "649", (16, 17, 18, 19)),
    ("65", "65", (16, 17, 18, 19)),
    ("300", "305", (14, 16, 17, 18, 19)),  # Diners Club
    ("36", "36", (14, 15, 16, 17, 18, 19)),
    ("38", "39", (14, 16, 17, 18, 19)),
    ("3528", "3589", (16, 17, 18, 19)),  # JCB
    ("62", "62", (16, 17, 18, 19)),  # UnionPay
    *(
        (prefix, prefix, tuple(range(12, 20))) for prefix in ("5018", "5020", "5038", "5893", "6304")
    ),  # Maestro
    ("6759", "6759", tuple(range(12, 20))),
    ("6761", "6763", tuple(range(12, 20))),
)

# length of an account number by country, from the registry of ISO 13616
IBAN_LENGTHS = {
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG YE", 25: "LY PT ST",
        26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip
_IBAN_HEAD = re.compile(r"[A-Z](?<!\w.)[A-Z][0-9]{2}(?= ?[A-Z0-9])")

# separators between digits as phonenumbers accepts them, at most 4 in a row
_BETWEEN = (
    r"[-x\u2010-\u2015\u2212\u30fc\uff0d-\uff0f \u00a0\u00ad\u200b\u2060\u3000()\uff08\uff09\uff3b\uff3d."
    r"\[\]/~\u2053\u223c\uff5e]{0,4}"
)
_MIN_DIGITS = 7
_DIGITS = rf"\d(?:{_BETWEEN}\d){{{_MIN_DIGITS - 1},}}"
_INTERNATIONAL, _NATIONAL = re.compile(rf"[+\uff0b]{_BETWEEN}{_DIGITS}"), re.compile(_DIGITS)
_AROUND = 64  # characters around a number that may decide about it, as an extension or a date
_WINDOW = 1 << 12  # characters of a line that phonenumbers reads at once
_MAX_NUMBER = 1 << 9  # characters of the longest candidate of phonenumbers

# detect-secrets' plugins that recognise a key by its form -> words of which any match contains one, in lower
# case; left out are plugins that judge by a variable's name, by entropy or by two letters, and those of npm
# and OpenAI, whose time is quadratic
PLUGINS = {
    "aws.AWSKeyDetector": ("a3t", "abia", "acca", "akia", "asia", "aws"),
    "azure_storage_key.AzureStorageKeyDetector": ("accountkey=",),
    "discord.DiscordBotTokenDetector": ("",),
    "github_token.GitHubTokenDetector": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    "gitlab_token.GitLabTokenDetector": ("gl", "gr1348941"),
    "mailchimp.MailchimpDetector": ("-us",),
    "pypi_token.PypiTokenDetector": ("pypi-age",),
    "sendgrid.SendGridDetector": ("sg.",),
    "slack.SlackDetector": ("xox", "hooks.slack.com"),
    "square_oauth.SquareOAuthDetector": ("sq0csp-",),
    "stripe.StripeDetector": ("k_live_",),
    "telegram_token.TelegramBotTokenDetector": (":",),
    "twilio.TwilioKeyDetector": ("ac", "sk"),
}
# forms that detect-secrets lacks, or of which it matches only the beginning. No pattern may read the same
# text from many starts: where it does not match, the group `skipped` takes what later starts would read again
_MORE_SECRETS: dict[str, tuple[str, ...]] = {
    HUB: ("hf_",),
    GITHUB_FINE_GRAINED: ("github_pat_",),
    GOOGLE: ("aiza",),
    r"(?<!\w)sk-(?:ant|proj)-[A-Za-z0-9_-]{20,}": ("sk-ant-", "sk-proj-"),  # Anthropic, OpenAI
    r"sk-(?:[A-Za-z0-9_-]*[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}|(?P<skipped>[A-Za-z0-9_-]*))": ("t3blbkfj",),
    r"/:_authToken=\s*(npm_.+|[A-Fa-f0-9-]{36})": (":_authtoken=",),
    # JSON Web Token, with its signature
    r"(?<!\w)eyJ(?:[\w=-]+\.[\w=-]+(?:\.[\w.+/=-]*\w)?|(?P<skipped>[\w=-]*))": ("eyj",),
    r"(?<=://)[^/\s:@'\"<>]+:[^/\s@'\"<>]+(?=@)": ("://",),  # a login in an address
}
_BEGIN_OF_KEY, _END_OF_KEY = re.compile(BEGIN_OF_PRIVATE_KEY), re.compile(END_OF_PRIVATE_KEY)
_LINES_OF_KEY = re.compile(r"(?:\s*[A-Za-z0-9+/=]{16,})*")
_MAX_KEY = 1 << 16  # characters between the borders of a private key
_REST = re.compile(r"[\w/+=-]*", re.ASCII)
_MIN_VALUE = 16  # a shorter group of a match is the head of a value, not the value


def emails(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Find mail addresses whose domain has a dot."""
    for domain in _DOMAIN.finditer(text) if "@" in text else ():
        start = domain.start()
        first = max(0, start - _MAX_LOCAL)
        *_, local = None, *_LOCAL.finditer(text, first, start)
        if local is not None and local.end() == start:
            yield local.start(), domain.end()


def phones(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Find numbers of at least 7 digits that phonenumbers holds valid: with a + in front, or as they are
    dialled in `recipe.phone_regions`."""
    from phonenumbers import PhoneNumberMatcher

    candidates = _NATIONAL if recipe.phone_regions else _INTERNATIONAL
    for start, stop, _ in _merged((*_around(found), 0) for found in candidates.finditer(text)):
        # phonenumbers copies the text behind a candidate and gives up after many: a long line is cut
        for first in range(start, stop, _WINDOW):
            low, high = max(start, first - _MAX_NUMBER), min(stop, first + _WINDOW + _MAX_NUMBER)
            for region in recipe.phone_regions or (None,):
                for match in PhoneNumberMatcher(text[low:high], region):
                    is_here = first <= low + match.start < first + _WINDOW
                    if is_here and sum(c.isdigit() for c in match.raw_string) >= _MIN_DIGITS:
                        yield low + match.start, low + match.end


def _around(found: re.Match[str]) -> Span:
    """The match with the text around it on its line."""
    text = found.string
    first = max(0, found.start() - _AROUND)
    start = max(first, text.rfind("\n", first, found.start()) + 1)
    end = text.find("\n", found.end(), found.end() + _AROUND)
    return start, end if end >= 0 else min(len(text), found.end() + _AROUND)


def cards(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Find numbers of payment cards: an issuer gives them out, and their check digit is right."""
    for candidate in _CARD_CANDIDATE.finditer(text):
        first = max(0, candidate.start() - 2)
        around = text[first : candidate.end() + 2]
        for found in itertools.chain.from_iterable(pattern.finditer(around) for pattern in CARDS):
            digits = re.sub("[ -]", "", found[0])
            is_issued = any(a <= digits[: len(a)] <= b and len(digits) in sizes for a, b, sizes in ISSUERS)
            if is_issued and luhn_sum(digits) % 10 == 0:
                yield first + found.start(), first + found.end()


def luhn_sum(digits: str) -> int:
    """Luhn sum (ISO/IEC 7812-1): every second digit from the right is doubled and its digits are added."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return sum(map(int, digits[::-2])) + sum(doubled)


def ibans(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Find international account numbers of their country's length whose check digits are right."""
    for head in _IBAN_HEAD.finditer(text):
        length = IBAN_LENGTHS.get(head[0][:2])
        found = None if length is None else _iban_tail(length - 4).match(text, head.end())
        if found is not None and iban_remainder(head[0] + found[0]) == 1:
            yield head.start(), found.end()


@functools.cache
def _iban_tail(length: int) -> re.Pattern[str]:
    return re.compile(rf"(?: ?[A-Z0-9]){{{length}}}(?!\w)")


def iban_remainder(number: str) -> int:
    """Remainder modulo 97, country and check digits moved to the end, letters as 10 to 35 (ISO 13616)."""
    plain = number.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97


def addresses(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Find public IP addresses of version 4 and 6."""
    for pattern in (_IPV4, _IPV6):
        for found in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(found[0])
            except ValueError:  # a number above 255, or too many groups
                continue
            if address.is_global and not address.is_multicast:
                yield found.span()


def secrets(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Find keys and tokens of a known form, logins in addresses, and private keys."""
    lowered = text.lower()
    for pattern, words in secret_patterns():
        if any(word in lowered for word in words):
            found = (match for match in pattern.finditer(text) if match.lastgroup != "skipped")
            yield from _values(text, map(_value_in, found))
    if "private key" in lowered:
        yield from _values(text, _private_keys(text))


def _value_in(found: re.Match[str]) -> Span:
    """Span of the secret in a match: a long group, or the match."""
    start, stop = found.span(found.lastindex or 0)
    return (start, stop) if stop - start >= _MIN_VALUE else found.span()


def _values(text: str, spans: Iterable[Span]) -> Iterator[Span]:
    """Spans, in order, without the quotes and separators around them.

    Each extends to the end of the word, as the length of some keys has changed since their pattern was
    written; a span within the one before is left out.
    """
    end = 0
    for start, stop in spans:
        value = text[start:stop]
        start += len(value) - len(value.lstrip(" \t\r\n=:\"'"))
        stop -= len(value) - len(value.rstrip(" \t\r\n\"'"))
        if stop > end:
            end = _REST.match(text, stop).end()  # type: ignore[union-attr]
            yield start, end


def _private_keys(text: str) -> Iterator[Span]:
    """Private keys to the first end within reach, or as far as lines of a key follow the header."""
    ends = [found.span() for found in _END_OF_KEY.finditer(text)]
    stop = 0
    for begin in _BEGIN_OF_KEY.finditer(text):
        if begin.start() < stop:
            continue
        i = bisect.bisect_left(ends, (begin.end(), 0))
        if i < len(ends) and ends[i][0] - begin.end() <= _MAX_KEY:
            stop = ends[i][1]
        else:
            stop = _LINES_OF_KEY.match(text, begin.end()).end()  # type: ignore[union-attr]
        yield begin.start(), stop


@functools.cache
def secret_patterns() -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
    """Patterns of secrets, each with lower-case words of which any match contains one."""
    found = [(re.compile(pattern), words) for pattern, words in _MORE_SECRETS.items()]
    for name, words in PLUGINS.items():
        module, _, plugin = name.partition(".")
        detector = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), plugin)
        found += [(pattern, words) for pattern in detector.denylist]
    return found


# type -> its finder; overlapping spans get the type that comes first here
DETECTORS: dict[str, Finder] = {
    "secret": secrets,
    "email": emails,
    "iban": ibans,
    "card": cards,
    "ip": addresses,
    "phone": phones,
}
# types that need a library of the extra [privacy] -> module, and name of the library
LIBRARIES = {"secret": ("detect_secrets", "detect-secrets"), "phone": ("phonenumbers", "phonenumbers")}
