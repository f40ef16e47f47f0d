"""Minimal pairs as a metric of evaluate: `evaluate.load(hf_genlm.metric_path("minimal_pairs"))`."""

import datasets
import evaluate

from hf_genlm.evaluation.figure import as_results
from hf_genlm.evaluation.outcomes import pair_accuracy

_DESCRIPTION = """
The share of minimal pairs, two sentences that differ in what makes one of them unacceptable, whose acceptable
sentence a language model finds likelier. As likely, to the rounding of float32, counts 1/2.
"""
_INPUTS = """
Args:
    good (list of float): log-probability of the acceptable sentence of each pair, summed over its tokens.
    bad (list of float): that of the other sentence.
Returns:
    minimal_pairs_accuracy (float), and minimal_pairs_accuracy_stderr, its standard error over pairs; None for
    one.
Example:
    >>> metric = evaluate.load(hf_genlm.metric_path("minimal_pairs"))
    >>> metric.compute(good=[-20.1, -31.5], bad=[-22.7, -30.9])["minimal_pairs_accuracy"]
    0.5
"""
_CITATION = """
@article{warstadt-etal-2020-blimp,
    title = "BLiMP: The Benchmark of Linguistic Minimal Pairs for English",
    author = "Warstadt, Alex and Parrish, Alicia and Liu, Haokun and Mohananey, Anhad and Peng, Wei and Wang,
        Sheng-Fu and Bowman, Samuel R.",
    journal = "Transactions of the Association for Computational Linguistics",
    volume = "8",
    year = "2020"
}
"""


class MinimalPairs(evaluate.Metric):
    """What `_DESCRIPTION` says."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"good": datasets.Value("float64"), "bad": datasets.Value("float64")}),
            reference_urls=["https://aclanthology.org/2020.tacl-1.25"],
        )

    def _compute(self, good, bad):
        return as_results({"minimal_pairs_accuracy": pair_accuracy(good, bad)})
