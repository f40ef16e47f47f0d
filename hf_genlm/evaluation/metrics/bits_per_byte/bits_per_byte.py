"""Bits per byte as a metric of evaluate: `evaluate.load(hf_genlm.metric_path("bits_per_byte"))`."""

import datasets
import evaluate

from hf_genlm.evaluation.figure import Figure, as_results
from hf_genlm.evaluation.outcomes import bits_per_byte

_DESCRIPTION = """
The bits that a causal language model needs for a UTF-8 byte of text: the sum of - log2 P over all tokens
divided by the bytes of the original text. Unlike perplexity it compares across tokenizers and vocabularies.

Two configurations: the default scores texts with a model of the Hub or on disk, "log_probabilities" takes
what was scored elsewhere. The default scores every token of every text once, the first given a start token;
texts longer than the context go through a sliding window and are not cut off. Sums are over tokens, so
neither the batches nor the lengths of the texts weigh on the result.
"""
_INPUTS = """
Args:
    predictions (list of str): texts. With the configuration "log_probabilities" (list of lists of float): the
        natural logarithm of the probability of each token of each text.
    references (list of str): with "log_probabilities" alone, the texts themselves, whose bytes are counted.
    model_id (str): in the default configuration, a run folder, a model folder or a Hub id. Code and weights
        other than safetensors are not read from it.
    context (int): in the default configuration, tokens that the model sees at once. Default: all that it has
        positions for, or 1024.
    batch_size (int): in the default configuration, windows in one forward pass. Default: 32.
Returns:
    bits_per_byte (float) and bits_per_byte_stderr, its standard error clustered by text (of fewer than 20
    texts in the default configuration: by window). The default configuration returns nats_per_token,
    perplexity, top1_accuracy and top5_accuracy too.
Example:
    >>> metric = evaluate.load(hf_genlm.metric_path("bits_per_byte"))
    >>> metric.compute(predictions=["a text"], model_id="my-model")["bits_per_byte"]
    >>> metric = evaluate.load(hf_genlm.metric_path("bits_per_byte"), "log_probabilities")
    >>> metric.compute(predictions=[[-0.6931471805599453] * 4], references=["text"])["bits_per_byte"]
    1.0
"""
_CITATION = """
@article{gao-etal-2020-pile,
    title = "The Pile: An 800GB Dataset of Diverse Text for Language Modeling",
    author = "Gao, Leo and Biderman, Stella and Black, Sid and others",
    journal = "arXiv preprint arXiv:2101.00027",
    year = "2020"
}
"""
_TEXT = datasets.Value("string")
_FEATURES = {
    "default": {"predictions": _TEXT},
    "log_probabilities": {"predictions": datasets.List(datasets.Value("float64")), "references": _TEXT},
}


class BitsPerByte(evaluate.Metric):
    """What `_DESCRIPTION` says."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _FEATURES:
            raise ValueError(f"configuration {self.config_name!r}: known are {', '.join(_FEATURES)}")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(_FEATURES[self.config_name]),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, predictions, references=None, model_id=None, context=None, batch_size=32):
        if self.config_name == "log_probabilities":
            n_bytes = [len(text.encode("utf-8")) for text in references]
            return as_results({"bits_per_byte": bits_per_byte([-sum(text) for text in predictions], n_bytes)})
        if model_id is None:
            raise ValueError("name the model to score the texts with by model_id")
        from hf_genlm.evaluation.evaluate import score_texts

        measurements = score_texts(predictions, model_id, context=context, batch_size=batch_size)
        return as_results({m.name: Figure(m.value, m.n, m.stderr) for m in measurements})
