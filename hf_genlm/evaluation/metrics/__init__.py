"""Our statistics as metrics of the library evaluate, loaded from this package without a network.

    import evaluate, hf_genlm
    evaluate.load(hf_genlm.metric_path("distinct_n")).compute(predictions=["a b a", "b a"])

Each other file here is the script of one metric: evaluate copies it to its cache, imports it there, and takes
the class that `metric_class` makes. Users of a metric see the docstring of its compute function. Scripts have
the names of statistics, which therefore are called by their modules here.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation import aggregation, text_statistics
from hf_genlm.evaluation.measurement import Statistic, to_results
from hf_genlm.files import read_text

_FOLDER = Path(__file__).parent


class _Metric(NamedTuple):
    """Function of inputs and settings, possible types of the inputs, key in citations.bib, and address of the
    source."""

    compute: Callable[..., dict[str, Any]]
    inputs: tuple[dict[str, str], ...]
    citation: str
    url: str


def metric_names() -> list[str]:
    """Names of all metrics in alphabetical order."""
    return sorted(script.stem for script in _FOLDER.glob("*.py") if script.stem != "__init__")


def metric_path(name: str) -> str:
    """Path of a metric of this package for `evaluate.load`.

    Raises:
        UserError: there is no such metric.
    """
    names = metric_names()
    if name not in names:
        raise UserError(f"no metric {name!r}{did_you_mean(name, names)}")
    return str(_FOLDER / f"{name}.py")


def metric_class(name: str) -> type:
    """Make the class of a metric, a subclass of evaluate.Metric."""
    import datasets
    import evaluate

    by_configuration = {configuration: m for (of, configuration), m in _METRICS.items() if of == name}
    docstring = inspect.cleandoc(by_configuration["default"].compute.__doc__ or "")
    description, _, usage = docstring.partition("\nArgs:")

    def feature(kind: str) -> Any:
        return datasets.List(feature(kind[1:-1])) if kind.startswith("[") else datasets.Value(kind)

    class Metric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            if self.config_name not in by_configuration:
                raise ValueError(f"configuration {self.config_name!r}; known: {', '.join(by_configuration)}")
            metric = by_configuration[self.config_name]
            options = [
                datasets.Features({column: feature(kind) for column, kind in columns.items()})
                for columns in metric.inputs
            ]
            return evaluate.MetricInfo(
                description=description,
                citation=_read_citations()[metric.citation],
                inputs_description=f"Args:{usage}",
                features=options if len(options) > 1 else options[0],
                reference_urls=[metric.url],
            )

        def _compute(self, **inputs: Any) -> dict[str, Any]:
            return by_configuration[self.config_name].compute(**inputs)

    Metric.__name__ = Metric.__qualname__ = "".join(word.title() for word in name.split("_"))
    return Metric


def _read_citations() -> dict[str, str]:
    """BibTeX entries by key."""
    entries = read_text(_FOLDER / "citations.bib").strip().split("\n\n")
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}


def _bits_per_byte(
    predictions: Any, model_id: str | None = None, context: int | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Bits that a causal language model needs for a UTF-8 byte of text.

    The sum of - log2 P over all tokens divided by the bytes of the original text. Unlike perplexity, it is
    comparable across tokenizers and vocabularies. The default configuration scores texts with a model: every
    token of every text once, the first given a start token, long texts in a sliding window. The configuration
    "log_probabilities" takes what was scored elsewhere.

    Args:
        predictions (list of str): texts. With the configuration "log_probabilities" (list of lists of float):
            natural logarithms of the probabilities of the tokens of each text.
        references (list of str): only with "log_probabilities": the texts, whose bytes are counted.
        model_id (str): a run folder, a model folder or a Hub id. Code and weights other than safetensors are
            not read from it.
        context (int): maximum number of input tokens. Default: as many as the model has positions for, or
            1024.
        batch_size (int): windows per forward pass. Default: 32.
    Returns:
        bits_per_byte (float) and bits_per_byte_stderr, its standard error clustered by text (for fewer than
        20 texts and the default configuration: by window). The default configuration also returns
        nats_per_token, perplexity, top1_accuracy and top5_accuracy.
    Example:
        >>> metric = evaluate.load(hf_genlm.metric_path("bits_per_byte"))
        >>> metric.compute(predictions=["a text"], model_id="my-model")["bits_per_byte"]
        >>> metric = evaluate.load(hf_genlm.metric_path("bits_per_byte"), "log_probabilities")
        >>> metric.compute(predictions=[[-0.6931471805599453] * 4], references=["text"])["bits_per_byte"]
        1.0
    """
    if model_id is None:
        raise ValueError("name the model to score the texts with by model_id")
    from hf_genlm.evaluation.evaluate import score_texts

    measurements = score_texts(predictions, model_id, context=context, batch_size=batch_size)
    return to_results({m.name: Statistic(m.value, m.n, m.stderr) for m in measurements})


def _bits_per_byte_of_log_probabilities(predictions: Any, references: Any) -> dict[str, Any]:
    n_bytes = [len(text.encode("utf-8")) for text in references]
    return to_results(
        {"bits_per_byte": aggregation.bits_per_byte([-sum(text) for text in predictions], n_bytes)}
    )


def _calibration_error(confidence: Any, correct: Any, bins: int = 15) -> dict[str, Any]:
    """Expected calibration error of predictions.

    The difference between confidence and accuracy, averaged over predictions in bins of equal width by
    confidence; 0 if they agree. With few predictions, chance alone inflates it.

    Args:
        confidence (list of float): the probability that each prediction was given.
        correct (list of bool): whether it was correct.
        bins (int): number of bins. Default: 15.
    Returns:
        calibration_error (float), and calibration_error_stderr, its standard error over predictions (None for
        one).
    Example:
        >>> metric = evaluate.load(hf_genlm.metric_path("calibration_error"))
        >>> metric.compute(confidence=[0.75, 0.75], correct=[True, False])["calibration_error"]
        0.25
    """
    return to_results({"calibration_error": aggregation.calibration_error(confidence, correct, bins)})


def _minimal_pairs(good: Any, bad: Any) -> dict[str, Any]:
    """Accuracy of a language model on pairs of an acceptable and an unacceptable sentence.

    The share of pairs whose acceptable sentence has the higher log-probability. A tie, to the rounding of
    float32, counts 1/2.

    Args:
        good (list of float): log-probability of each acceptable sentence, summed over its tokens.
        bad (list of float): that of the other sentence.
    Returns:
        minimal_pairs_accuracy (float), and minimal_pairs_accuracy_stderr, its standard error over pairs (None
        for one).
    Example:
        >>> metric = evaluate.load(hf_genlm.metric_path("minimal_pairs"))
        >>> metric.compute(good=[-20.1, -31.5], bad=[-22.7, -30.9])["minimal_pairs_accuracy"]
        0.5
    """
    from hf_genlm.evaluation.benchmarks import pair_accuracy

    return to_results({"minimal_pairs_accuracy": pair_accuracy(good, bad)})


def _text_statistic(
    function: Callable[..., Any], prefix: str, predictions: Any, n: tuple[int, ...]
) -> dict[str, Any]:
    tokens = [text_statistics.split_words(text) if isinstance(text, str) else text for text in predictions]
    return to_results({f"{prefix}_{length}": function(tokens, length) for length in n})


def _distinct_n(predictions: Any, n: Any = (1, 2, 3, 4)) -> dict[str, Any]:
    """Diversity: number of different n-grams over number of n-grams, of all texts together.

    1 if no n-gram occurs twice. It falls with the number and the length of the texts: compare it at equal
    number and length only.

    Args:
        predictions (list of str, or of lists of int): texts, which are counted in words, or token ids.
        n (list of int): lengths of n-grams. Default: 1, 2, 3, 4.
    Returns:
        distinct_N (float) for each N, and distinct_N_stderr, its jackknife standard error over texts; None if
        no text has N tokens, the error also for a single text.
    Example:
        >>> metric = evaluate.load(hf_genlm.metric_path("distinct_n"))
        >>> metric.compute(predictions=["the cat", "the dog"], n=[1])
        {'distinct_1': 0.75, 'distinct_1_stderr': 0.0}
    """
    return _text_statistic(text_statistics.distinct_n, "distinct", predictions, n)


def _repetition(predictions: Any, n: Any = (4,)) -> dict[str, Any]:
    """seq-rep-n: share of a text's n-grams that repeat an earlier one of the same text.

    Averaged over texts; 0 if no text repeats itself. Texts shorter than n are left out.

    Args:
        predictions (list of str, or of lists of int): texts, which are counted in words, or token ids.
        n (list of int): lengths of n-grams. Default: 4, as in the paper.
    Returns:
        seq_rep_N (float) for each N, and seq_rep_N_stderr, its standard error over texts; None if no text has
        N tokens, the error also for a single text.
    Example:
        >>> metric = evaluate.load(hf_genlm.metric_path("repetition"))
        >>> metric.compute(predictions=["la la la", "oh no"], n=[1])["seq_rep_1"]
        0.3333333333333333
    """
    return _text_statistic(text_statistics.repetition, "seq_rep", predictions, n)


def _self_bleu(predictions: Any, n: Any = (4,)) -> dict[str, Any]:
    """self-BLEU-n: mean BLEU of each text with all others as references.

    From 0 (nothing in common) to 1 (all equal). BLEU is that of nltk's sentence_bleu with smoothing method 1,
    as in the paper's own code. It rises with the number of texts: compare it at equal number and length only.

    Args:
        predictions (list of str, or of lists of int): texts, which are counted in words, or token ids.
        n (list of int): highest orders of n-grams, with equal weights of 1 to n. Default: 4.
    Returns:
        self_bleu_N (float) for each N, and self_bleu_N_stderr, its jackknife standard error over texts; None
        for fewer than two texts, the error also for two.
    Example:
        >>> metric = evaluate.load(hf_genlm.metric_path("self_bleu"))
        >>> metric.compute(predictions=["a cat sat here"] * 2)["self_bleu_4"]
        1.0
    """
    return _text_statistic(text_statistics.self_bleu, "self_bleu", predictions, n)


def _training_overlap(
    predictions: Any, training_texts: Any = (), lengths: Any = (1, 2, 4, 8, 16, 32)
) -> dict[str, Any]:
    """Verbatim overlap of generated texts with the training text of the model.

    The share of their spans of some length in words that occur in the training text, and the longest span
    that does. Compare it with that of human texts of the same kind that the model has not seen.

    Args:
        predictions (list of str): texts.
        training_texts (iterable of str): training text of the model. It is read once, and may be a generator:
            memory does not grow with it.
        lengths (list of int): of spans, in words. Default: 1, 2, 4, 8, 16, 32.
    Returns:
        training_overlap_L (float) for each length L that a text has, and training_overlap_L_stderr, its
        standard error clustered by text (None for a single text); longest_copied_span (str), its words joined
        by spaces; longest_copied_words (int), their number.
    Example:
        >>> metric = evaluate.load(hf_genlm.metric_path("training_overlap"))
        >>> given = {"predictions": ["to be or what"], "training_texts": ["to be or not to be"]}
        >>> metric.compute(**given)["longest_copied_span"]
        'to be or'
    """
    shares, longest = text_statistics.measure_overlap(predictions, training_texts, lengths)
    results = to_results({f"training_overlap_{length}": share for length, share in shares.items()})
    return {**results, "longest_copied_span": " ".join(longest), "longest_copied_words": len(longest)}


_TEXTS = ({"predictions": "string"},)
_TEXTS_OR_IDS = (*_TEXTS, {"predictions": "[int64]"})
_METRICS = {
    ("bits_per_byte", "default"): _Metric(
        _bits_per_byte, _TEXTS, "gao-etal-2020-pile", "https://arxiv.org/abs/2101.00027"
    ),
    ("bits_per_byte", "log_probabilities"): _Metric(
        _bits_per_byte_of_log_probabilities,
        ({"predictions": "[float64]", "references": "string"},),
        "gao-etal-2020-pile",
        "https://arxiv.org/abs/2101.00027",
    ),
    ("calibration_error", "default"): _Metric(
        _calibration_error,
        ({"confidence": "float64", "correct": "bool"},),
        "guo-etal-2017-calibration",
        "https://proceedings.mlr.press/v70/guo17a.html",
    ),
    ("distinct_n", "default"): _Metric(
        _distinct_n, _TEXTS_OR_IDS, "li-etal-2016-diversity", "https://aclanthology.org/N16-1014"
    ),
    ("minimal_pairs", "default"): _Metric(
        _minimal_pairs,
        ({"good": "float64", "bad": "float64"},),
        "warstadt-etal-2020-blimp",
        "https://aclanthology.org/2020.tacl-1.25",
    ),
    ("repetition", "default"): _Metric(
        _repetition, _TEXTS_OR_IDS, "welleck-etal-2020-neural", "https://openreview.net/forum?id=SJeYe0NtvH"
    ),
    ("self_bleu", "default"): _Metric(
        _self_bleu, _TEXTS_OR_IDS, "zhu-etal-2018-texygen", "https://arxiv.org/abs/1802.01886"
    ),
    ("training_overlap", "default"): _Metric(
        _training_overlap, _TEXTS, "mccoy-etal-2023-much", "https://aclanthology.org/2023.tacl-1.38"
    ),
}
