"""Script of the metric calibration_error for the library evaluate."""

from hf_genlm.evaluation.metrics import metric_class

Metric = metric_class("calibration_error")
