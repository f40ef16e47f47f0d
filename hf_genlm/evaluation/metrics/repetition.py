"""Script of the metric repetition for the library evaluate."""

from hf_genlm.evaluation.metrics import metric_class

Metric = metric_class("repetition")
