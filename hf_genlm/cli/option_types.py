"""How a word of the command line becomes the number or the list that an option takes."""

import argparse


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(word.strip()) for word in text.split(",")]


def amounts(text: str) -> list[float]:
    return [amount(word.strip()) for word in text.split(",")]


def amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
