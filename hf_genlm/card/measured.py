"""A measurement as people read it: its title and definition, and as many figures as its error leaves."""

import math

from hf_genlm.evaluation.measurement import Measurement

# What a card says of each measurement: title, definition.
DEFINITIONS = {
    "bits_per_byte": (
        "Bits per byte",
        "total -log2 probability of the text over the number of its UTF-8 bytes, those of the original text, "
        "not of its tokens; models with different vocabularies compare by it",
    ),
    "nats_per_token": ("Nats per token", "mean -ln probability of a token of this model's own vocabulary"),
    "perplexity": ("Perplexity per token", "exp of the nats per token; compares only within one vocabulary"),
    "mean_language_bits_per_byte": (
        "Bits per byte, mean of the languages",
        "every language weighs the same, whatever text there is of it",
    ),
    "worst_language_bits_per_byte": (
        "Bits per byte, worst language",
        "the highest of the languages; a language also differs in what its script needs in bytes",
    ),
    "top1_accuracy": ("Top-1 accuracy", "share of tokens that the model ranked first; ties count against it"),
    "top5_accuracy": ("Top-5 accuracy", "share of tokens that the model ranked among its first five"),
    "calibration_error": (
        "Calibration error",
        "expected calibration error of the likeliest token, over 15 bins of equal width",
    ),
    "word_perplexity": (
        "Perplexity per word",
        "exp of the nats per word of the original text; as lm-evaluation-harness counts, a document has one "
        "word more than runs of white space; models with different vocabularies compare by it",
    ),
    "minimal_pairs_accuracy": (
        "Minimal pairs",
        "share of pairs of sentences of which the model finds the acceptable one likelier; ties count half",
    ),
    "minimal_pairs_accuracy_macro": ("Minimal pairs, macro", "mean of that over the linguistic phenomena"),
}


def title(measurement: Measurement) -> str:
    """`Bits per byte`; with its part behind it, where it is of a part."""
    name, _, part = measurement.name.partition("/")
    shown = DEFINITIONS.get(name, (name, ""))[0]
    return f"{shown}: {part}" if part else shown


def interval(measurement: Measurement) -> str:
    """`1.38 to 1.41`, both ends of the 95 % interval."""
    if measurement.interval is None:
        return "unknown"
    return " to ".join(figures(end, measurement) for end in measurement.interval)


def figures(number: float | None, measurement: Measurement) -> str:
    """`number` to the second figure of its standard error, to 4 decimals where that is unknown."""
    if number is None or not math.isfinite(number):
        return "unknown"
    if not measurement.stderr:
        return f"{number:,.4f}"
    return f"{number:,.{min(8, max(0, 1 - math.floor(math.log10(measurement.stderr))))}f}"
