"""Calibration as a metric of evaluate: `evaluate.load(hf_genlm.metric_path("calibration_error"))`."""

import datasets
import evaluate

from hf_genlm.evaluation.figure import as_results
from hf_genlm.evaluation.outcomes import calibration_error
from hf_genlm.evaluation.sums import BINS

_DESCRIPTION = """
The expected calibration error: how far confidences are from how often they are right, averaged over
predictions that were put into bins of equal width by their confidence. 0 where they agree. Of few
predictions, chance alone makes it larger than that of all.
"""
_INPUTS = """
Args:
    confidence (list of float): the probability that each prediction was given.
    correct (list of bool): whether it was right.
    bins (int): how many. Default: 15.
Returns:
    calibration_error (float), and calibration_error_stderr, its standard error over predictions; None for
    one.
Example:
    >>> metric = evaluate.load(hf_genlm.metric_path("calibration_error"))
    >>> metric.compute(confidence=[0.75, 0.75], correct=[True, False])["calibration_error"]
    0.25
"""
_CITATION = """
@inproceedings{guo-etal-2017-calibration,
    title = "On Calibration of Modern Neural Networks",
    author = "Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.",
    booktitle = "International Conference on Machine Learning",
    year = "2017"
}
"""


class CalibrationError(evaluate.Metric):
    """What `_DESCRIPTION` says."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"confidence": datasets.Value("float64"), "correct": datasets.Value("bool")}
            ),
            reference_urls=["https://proceedings.mlr.press/v70/guo17a.html"],
        )

    def _compute(self, confidence, correct, bins=BINS):
        return as_results({"calibration_error": calibration_error(confidence, correct, bins)})
