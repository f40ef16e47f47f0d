"""Script of the metric distinct_n for the library evaluate."""

from hf_genlm.evaluation.metrics import metric_class

Metric = metric_class("distinct_n")
