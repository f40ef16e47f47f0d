"""self-BLEU as a metric of evaluate: `evaluate.load(hf_genlm.metric_path("self_bleu"))`."""

import datasets
import evaluate

from hf_genlm.evaluation.figure import as_results
from hf_genlm.evaluation.ngrams import self_bleu
from hf_genlm.evaluation.words import tokens_of

_DESCRIPTION = """
self-BLEU-n: the mean over texts of the BLEU of each with all others as its references, from 0 (nothing in
common) to 1 (all the same). BLEU is that of nltk's sentence_bleu with smoothing method 1, as in the paper's
own code. It rises with the number of texts: compare it at the same count and length only.
"""
_INPUTS = """
Args:
    predictions (list of str, or of lists of int): texts, which are counted in words, or token ids.
    n (list of int): highest orders of n-grams, with equal weights of 1 to n. Default: 4.
Returns:
    self_bleu_N (float) for each N, and self_bleu_N_stderr, its standard error by the jackknife over texts;
    None for fewer than two texts, the error also for two.
Example:
    >>> metric = evaluate.load(hf_genlm.metric_path("self_bleu"))
    >>> metric.compute(predictions=["a cat sat here"] * 2)["self_bleu_4"]
    1.0
"""
_CITATION = """
@inproceedings{zhu-etal-2018-texygen,
    title = "Texygen: A Benchmarking Platform for Text Generation Models",
    author = "Zhu, Yaoming and Lu, Sidi and Zheng, Lei and Guo, Jiaxian and Zhang, Weinan and Wang, Jun and
        Yu, Yong",
    booktitle = "International ACM SIGIR Conference on Research and Development in Information Retrieval",
    year = "2018"
}
"""


class SelfBleu(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1802.01886"],
        )

    def _compute(self, predictions, n=(4,)):
        texts = tokens_of(predictions)
        return as_results({f"self_bleu_{order}": self_bleu(texts, order) for order in n})
