"""seq-rep-n as a metric of evaluate: `evaluate.load(hf_genlm.metric_path("repetition"))`."""

import datasets
import evaluate

from hf_genlm.evaluation.figure import as_results
from hf_genlm.evaluation.ngrams import repetition
from hf_genlm.evaluation.words import tokens_of

_DESCRIPTION = """
seq-rep-n: the share of a text's n-grams that repeat an earlier one of the same text, averaged over texts; 0
where no text repeats itself. Texts shorter than n take no part.
"""
_INPUTS = """
Args:
    predictions (list of str, or of lists of int): texts, which are counted in words, or token ids.
    n (list of int): lengths of n-grams. Default: 4, as in the paper.
Returns:
    seq_rep_N (float) for each N, and seq_rep_N_stderr, its standard error over texts; None where no text is
    so long, the error also of a single text.
Example:
    >>> metric = evaluate.load(hf_genlm.metric_path("repetition"))
    >>> metric.compute(predictions=["la la la", "oh no"], n=[1])["seq_rep_1"]
    0.3333333333333333
"""
_CITATION = """
@inproceedings{welleck-etal-2020-neural,
    title = "Neural Text Generation With Unlikelihood Training",
    author = "Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and
        Weston, Jason",
    booktitle = "International Conference on Learning Representations",
    year = "2020"
}
"""


class Repetition(evaluate.Metric):
    """What `_DESCRIPTION` says."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
            ],
            reference_urls=["https://openreview.net/forum?id=SJeYe0NtvH"],
        )

    def _compute(self, predictions, n=(4,)):
        texts = tokens_of(predictions)
        return as_results({f"seq_rep_{length}": repetition(texts, length) for length in n})
