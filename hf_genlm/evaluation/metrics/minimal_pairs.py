"""Script of the metric minimal_pairs for the library evaluate."""

from hf_genlm.evaluation.metrics import metric_class

Metric = metric_class("minimal_pairs")
