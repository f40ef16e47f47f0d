"""Training overlap as a metric of evaluate: `evaluate.load(hf_genlm.metric_path("training_overlap"))`."""

import datasets
import evaluate

from hf_genlm.evaluation.figure import as_results
from hf_genlm.evaluation.overlap import LENGTHS, count_overlap

_DESCRIPTION = """
How much of generated texts stands word for word in the text that the model was trained on: the share of their
spans of so many words, and the longest span that does. Words are counted without the spaces between them.
What to expect is what human texts of the same kind, which the model has not seen, have in common with the
training text.
"""
_INPUTS = """
Args:
    predictions (list of str): texts.
    training_texts (iterable of str): what the model was trained on. It is read once, and may be a generator:
        memory does not grow with it.
    lengths (list of int): of spans, in words. Default: 1, 2, 4, 8, 16, 32.
Returns:
    training_overlap_L (float) for each length L that a text has, and training_overlap_L_stderr, its standard
    error clustered by text (None for a single text); longest_copied_span (str), its words joined by spaces;
    longest_copied_words (int), their number.
Example:
    >>> metric = evaluate.load(hf_genlm.metric_path("training_overlap"))
    >>> training_texts = ["to be or not to be"]
    >>> metric.compute(predictions=["to be or what"], training_texts=training_texts)["longest_copied_span"]
    'to be or'
"""
_CITATION = """
@article{mccoy-etal-2023-much,
    title = "How Much Do Language Models Copy From Their Training Data? Evaluating Linguistic Novelty in Text
        Generation Using RAVEN",
    author = "McCoy, R. Thomas and Smolensky, Paul and Linzen, Tal and Gao, Jianfeng and Celikyilmaz, Asli",
    journal = "Transactions of the Association for Computational Linguistics",
    volume = "11",
    year = "2023"
}
"""


class TrainingOverlap(evaluate.Metric):
    """What `_DESCRIPTION` says."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://aclanthology.org/2023.tacl-1.38"],
        )

    def _compute(self, predictions, training_texts=(), lengths=LENGTHS):
        overlap = count_overlap(predictions, training_texts, lengths)
        shares = {f"training_overlap_{length}": share for length, share in overlap.shares.items()}
        longest = {
            "longest_copied_span": " ".join(overlap.longest),
            "longest_copied_words": len(overlap.longest),
        }
        return as_results(shares) | longest
