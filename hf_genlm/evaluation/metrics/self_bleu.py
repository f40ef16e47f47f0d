"""Script of the metric self_bleu for the library evaluate."""

from hf_genlm.evaluation.metrics import metric_class

Metric = metric_class("self_bleu")
