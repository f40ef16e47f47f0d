"""Where personal data and secrets stand in a text: a finder for each type that `corpus.scrub` knows."""

import functools
import importlib
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import (
    BEGIN_OF_PRIVATE_KEY,
    END_OF_PRIVATE_KEY,
    GITHUB_FINE_GRAINED,
    GOOGLE,
    HUB,
)

Span = tuple[int, int]  # of characters
Finder = Callable[[str, CorpusRecipe], Iterable[Span]]

_LOCAL = re.compile(r"\w[\w.%+-]*(?:'[\w.%+-]+)*\Z")
_LONGEST_LOCAL = 128  # characters before the @: twice of what RFC 5321 allows
# behind the @: labels, and a last one of letters (or xn--, in punycode)
_DOMAIN = re.compile(
    r"@(?:[^\W_](?:[\w-]{0,62})\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,63})(?![\w@])", re.IGNORECASE
)

# a pattern that begins with a character is searched many times as fast as one that begins by looking back:
# what must not stand before the first one is asked behind it
_IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.\w)")
# RFC 4291 and IANA: what is given out as global unicast begins with 2 or 3
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])")

_CARD_CANDIDATE = re.compile(r"[0-9](?<!\w.)(?:[ -]?[0-9]){11,}")
# how a card number is grouped: not at all, or by one kind of sign
_CARDS = [
    re.compile(rf"(?<!\w)(?<![0-9][.-]){digits}(?!\w|[.-][0-9])")
    for digits in (
        "[0-9]{12,19}",
        r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}",
        r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}\1[0-9]{3}",
        r"[0-9]{4}([ -])[0-9]{6}\1[0-9]{4,5}",
    )
]
# the issuers of ISO/IEC 7812: (first and last of the numbers that a card begins with, lengths)
_ISSUERS = (
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
    ("5018", "5018", tuple(range(12, 20))),  # Maestro
    ("5020", "5020", tuple(range(12, 20))),
    ("5038", "5038", tuple(range(12, 20))),
    ("5893", "5893", tuple(range(12, 20))),
    ("6304", "6304", tuple(range(12, 20))),
    ("6759", "6759", tuple(range(12, 20))),
    ("6761", "6763", tuple(range(12, 20))),
)

# characters of an account number by country, from the registry of ISO 13616
IBAN_LENGTHS = {
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS",
        23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG YE", 25: "LY PT ST",
        26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip
IBAN_LENGTHS["VA"] = 22
_IBAN_HEAD = re.compile(r"[A-Z](?<!\w.)[A-Z][0-9]{2}(?= ?[A-Z0-9])")

# what phonenumbers takes for a sign between digits, at most 4 of them
_BETWEEN = (
    r"[-x\u2010-\u2015\u2212\u30fc\uff0d-\uff0f \u00a0\u00ad\u200b\u2060\u3000()\uff08\uff09\uff3b\uff3d."
    r"\[\]/~\u2053\u223c\uff5e]{0,4}"
)
_LEAST_DIGITS = 7
_DIGITS = rf"\d(?:{_BETWEEN}\d){{{_LEAST_DIGITS - 1},}}"
_INTERNATIONAL, _NATIONAL = re.compile(rf"[+\uff0b]{_BETWEEN}{_DIGITS}"), re.compile(_DIGITS)
_AROUND = 64  # characters that may decide about a number, as an extension or a date

# detect-secrets' plugins that know a key by its form, and words of which one stands in each (of a text in
# small letters); those that go by the name of a variable, by entropy or by two letters are left out
PLUGINS = {
    "aws.AWSKeyDetector": ("a3t", "abia", "acca", "akia", "asia", "aws"),
    "azure_storage_key.AzureStorageKeyDetector": ("accountkey=",),
    "discord.DiscordBotTokenDetector": ("",),
    "github_token.GitHubTokenDetector": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    "gitlab_token.GitLabTokenDetector": ("gl", "gr1348941"),
    "mailchimp.MailchimpDetector": ("-us",),
    "npm.NpmDetector": (":_authtoken=",),
    "openai.OpenAIDetector": ("t3blbkfj",),
    "pypi_token.PypiTokenDetector": ("pypi-age",),
    "sendgrid.SendGridDetector": ("sg.",),
    "slack.SlackDetector": ("xox", "hooks.slack.com"),
    "square_oauth.SquareOAuthDetector": ("sq0csp-",),
    "stripe.StripeDetector": ("k_live_",),
    "telegram_token.TelegramBotTokenDetector": (":",),
    "twilio.TwilioKeyDetector": ("ac", "sk"),
}
# what it does not know, or takes the head of alone
_MORE_SECRETS: dict[str, tuple[str, ...]] = {
    HUB: ("hf_",),
    GITHUB_FINE_GRAINED: ("github_pat_",),
    GOOGLE: ("aiza",),
    r"(?<!\w)sk-(?:ant|proj)-[A-Za-z0-9_-]{20,}": ("sk-ant-", "sk-proj-"),  # Anthropic, OpenAI
    r"(?<!\w)eyJ[\w=-]+\.[\w=-]+(?:\.[\w.+/=-]*\w)?": ("eyj",),  # JSON Web Token, with its signature
    r"(?<=://)[^/\s:@'\"<>]+:[^/\s@'\"<>]+(?=@)": ("://",),  # a login in an address
    rf"{BEGIN_OF_PRIVATE_KEY}(?:[\s\S]{{0,65536}}?{END_OF_PRIVATE_KEY}|(?:\s*[A-Za-z0-9+/=]{{16,}})*)": (
        "private key",
    ),
}
_REST = re.compile(r"[\w/+=-]*", re.ASCII)
_LEAST_VALUE = 16  # characters from which on a group is the value, and not the head of one


def emails(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """An address with a domain that has a dot."""
    for domain in _DOMAIN.finditer(text) if "@" in text else ():
        start = domain.start()
        first = max(0, start - _LONGEST_LOCAL)
        local = _LOCAL.search(text[first:start])
        if local is not None:
            yield first + local.start(), domain.end()


def phones(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """What phonenumbers takes for a valid number of at least 7 digits: with a + in front, or as it is dialled
    in `recipe.phone_regions`."""
    from phonenumbers import PhoneNumberMatcher

    candidates = _NATIONAL if recipe.phone_regions else _INTERNATIONAL
    for start, stop in _windows(text, candidates):
        for region in recipe.phone_regions or (None,):
            for match in PhoneNumberMatcher(text[start:stop], region):
                if sum(c.isdigit() for c in match.raw_string) >= _LEAST_DIGITS:
                    yield start + match.start, start + match.end


def _windows(text: str, candidates: re.Pattern[str]) -> Iterator[Span]:
    """What stands around the candidates on their line; windows that meet are one."""
    begun: Span | None = None
    for found in candidates.finditer(text):
        start = max(text.rfind("\n", 0, found.start()) + 1, found.start() - _AROUND)
        end = text.find("\n", found.end(), found.end() + _AROUND)
        stop = end if end >= 0 else min(len(text), found.end() + _AROUND)
        if begun is not None and start < begun[1]:
            begun = begun[0], stop
            continue
        if begun is not None:
            yield begun
        begun = start, stop
    if begun is not None:
        yield begun


def cards(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Numbers that an issuer of payment cards gives out and whose last digit checks the others."""
    for candidate in _CARD_CANDIDATE.finditer(text):
        first = max(0, candidate.start() - 2)
        around = text[first : candidate.end() + 2]
        for found in itertools.chain.from_iterable(pattern.finditer(around) for pattern in _CARDS):
            if is_card(re.sub("[ -]", "", found[0])):
                yield first + found.start(), first + found.end()


def is_card(digits: str) -> bool:
    """True if an issuer gives out such numbers, and the check digit is right (Luhn, ISO/IEC 7812-1)."""
    is_issued = any(
        first <= digits[: len(first)] <= last and len(digits) in lengths for first, last, lengths in _ISSUERS
    )
    return is_issued and luhn_sum(digits) % 10 == 0


def luhn_sum(digits: str) -> int:
    """Of the digits, every second from the right doubled and its own digits added (ISO/IEC 7812-1)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return sum(map(int, digits[::-2])) + sum(doubled)


def ibans(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """International account numbers of the length of their country, whose check digits are right."""
    for head in _IBAN_HEAD.finditer(text):
        length = IBAN_LENGTHS.get(head[0][:2])
        found = None if length is None else _iban_tail(length - 4).match(text, head.end())
        if found is not None and iban_remainder(head[0] + found[0]) == 1:
            yield head.start(), found.end()


@functools.cache
def _iban_tail(length: int) -> re.Pattern[str]:
    return re.compile(rf"(?: ?[A-Z0-9]){{{length}}}(?!\w)")


def iban_remainder(number: str) -> int:
    """Of division by 97, country and check digits behind the rest and letters as 10 to 35 (ISO 13616)."""
    plain = number.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97


def addresses(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """IP addresses, of version 4 and 6, that lead to somewhere on the internet."""
    for pattern in (_IPV4, _IPV6):
        for found in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(found[0])
            except ValueError:  # a number above 255, or too many groups
                continue
            if address.is_global and not address.is_multicast:
                yield found.span()


def secrets(text: str, recipe: CorpusRecipe) -> Iterator[Span]:
    """Keys and tokens that have a form of their own, logins in addresses and private keys."""
    small = text.lower()
    for pattern, words in _secret_patterns():
        if not any(word in small for word in words):
            continue
        for found in pattern.finditer(text):
            yield _value_in(found)


def _value_in(found: re.Match[str]) -> Span:
    """Where the secret stands in a match: a long group of it, or all but what it is set off by; and to its
    end, where a pattern knows a length that has changed."""
    start, stop = found.span(found.lastindex or 0)
    if stop - start < _LEAST_VALUE:
        start, stop = found.span()
    value = found.string[start:stop]
    start += len(value) - len(value.lstrip(" \t\r\n=:\"'"))
    stop -= len(value) - len(value.rstrip(" \t\r\n\"'"))
    return start, _REST.match(found.string, stop).end()  # type: ignore[union-attr]


@functools.cache
def _secret_patterns() -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
    """With words of which one stands in a text in small letters, or the pattern does not match."""
    found = [(re.compile(pattern), words) for pattern, words in _MORE_SECRETS.items()]
    for name, words in PLUGINS.items():
        module, _, plugin = name.partition(".")
        detector = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), plugin)
        found += [(pattern, words) for pattern in detector.denylist]
    return found


# type -> where it stands in a text; where spans meet they are one, of the type that comes first here
DETECTORS: dict[str, Finder] = {
    "secret": secrets,
    "email": emails,
    "iban": ibans,
    "card": cards,
    "ip": addresses,
    "phone": phones,
}
# what needs a library of the extra [privacy]: its module, and its name
LIBRARIES = {"secret": ("detect_secrets", "detect-secrets"), "phone": ("phonenumbers", "phonenumbers")}
