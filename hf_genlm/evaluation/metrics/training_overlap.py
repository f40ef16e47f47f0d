"""Script of the metric training_overlap for the library evaluate."""

from hf_genlm.evaluation.metrics import metric_class

Metric = metric_class("training_overlap")
