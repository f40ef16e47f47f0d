"""Script of the metric bits_per_byte for the library evaluate."""

from hf_genlm.evaluation.metrics import metric_class

Metric = metric_class("bits_per_byte")
