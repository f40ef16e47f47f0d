"""distinct-n as a metric of evaluate: `evaluate.load(hf_genlm.metric_path("distinct_n"))`."""

import datasets
import evaluate

from hf_genlm.evaluation.figure import as_results
from hf_genlm.evaluation.ngrams import distinct_n
from hf_genlm.evaluation.words import tokens_of

_DESCRIPTION = """
distinct-n: the share of the n-grams of all texts together that are different ones; 1 where none comes twice.
It falls with the number and the length of the texts: compare it at the same count and length only.
"""
_INPUTS = """
Args:
    predictions (list of str, or of lists of int): texts, which are counted in words, or token ids.
    n (list of int): lengths of n-grams. Default: 1, 2, 3, 4.
Returns:
    distinct_N (float) for each N, and distinct_N_stderr, its standard error by the jackknife over texts; None
    where no text is so long, the error also of a single text.
Example:
    >>> metric = evaluate.load(hf_genlm.metric_path("distinct_n"))
    >>> metric.compute(predictions=["the cat", "the dog"], n=[1])
    {'distinct_1': 0.75, 'distinct_1_stderr': 0.0}
"""
_CITATION = """
@inproceedings{li-etal-2016-diversity,
    title = "A Diversity-Promoting Objective Function for Neural Conversation Models",
    author = "Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill",
    booktitle = "Proceedings of NAACL-HLT",
    year = "2016"
}
"""


class DistinctN(evaluate.Metric):
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
            reference_urls=["https://aclanthology.org/N16-1014"],
        )

    def _compute(self, predictions, n=(1, 2, 3, 4)):
        texts = tokens_of(predictions)
        return as_results({f"distinct_{length}": distinct_n(texts, length) for length in n})
