"""Promise: transformers' own common tests of models pass for every kind of config."""

import unittest

import pytest
import torch
from support import upstream
from support.models import KINDS

from hf_genlm.model import (
    GenLMConfig,
    GenLMForCausalLM,
    GenLMForSequenceClassification,
    GenLMForTokenClassification,
    GenLMModel,
)

pytest.importorskip("parameterized", reason="parameterized is not installed: pip install '.[test]'")
try:
    common = upstream.load("test_modeling_common")
    ConfigTester = upstream.load("test_configuration_common").ConfigTester
    TrainingTesterMixin = upstream.load("test_training_mixin").TrainingTesterMixin
except FileNotFoundError:
    pytest.skip(
        "transformers' tests are not fetched: python tests/support/upstream.py", allow_module_level=True
    )


class ModelTester:
    """A small config and inputs for it, by the interface of transformers' mixins."""

    batch_size, seq_length, is_training, num_labels = 13, 7, True, 3
    vocab_size, hidden_size, num_attention_heads = 99, 32, 4
    base_model_class, causal_lm_class = GenLMModel, GenLMForCausalLM

    def __init__(self, parent, overrides: dict):
        self.parent = parent
        self.overrides = overrides
        self.num_hidden_layers = len(overrides["mixer_types"])

    def get_config(self) -> GenLMConfig:
        shapes = {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "num_key_value_heads": 2,
            "num_attention_heads": self.num_attention_heads, "intermediate_size": 37,
            "max_position_embeddings": 512, "sliding_window": 5,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        return GenLMConfig(**{**shapes, **self.overrides})

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class KindTest(common.ModelTesterMixin, TrainingTesterMixin):
    """All tests of transformers' mixins for the config `overrides`.

    Two are changed, as in transformers' own hybrid and recurrent models: test_attention_outputs expects
    weights of attention layers only; test_generation_tester_mixin_inheritance needs a mixin that the source
    distribution lacks, in place of which there is tests/model/test_generate.py.
    """

    overrides: dict = {}
    model_tester = None
    test_can_init_all_missing_weights_before_2023 = True  # a file without a year counts as an old one
    training_overfit_steps, training_overfit_learning_rate = 100, 5e-3  # theirs: 300 at 1e-3
    all_model_classes = (
        GenLMModel,
        GenLMForCausalLM,
        GenLMForSequenceClassification,
        GenLMForTokenClassification,
    )

    def setUp(self):
        self.model_tester = ModelTester(self, self.overrides)
        self.config_tester = ConfigTester(self, config_class=GenLMConfig, hidden_size=37)
        layer_types = self.model_tester.get_config().layer_types
        self.n_attention = sum(layer_type != "genlm_linear_attention" for layer_type in layer_types)
        self.has_attentions = self.n_attention > 0

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_attention_outputs(self):
        layers, self.model_tester.num_hidden_layers = self.model_tester.num_hidden_layers, self.n_attention
        super().test_attention_outputs()
        self.model_tester.num_hidden_layers = layers

    def test_generation_tester_mixin_inheritance(self):
        assert self.all_generative_model_classes == (GenLMForCausalLM,)


for _kind, _overrides in KINDS.items():
    _name = "Test" + _kind.title().replace("_", "")
    globals()[_name] = type(_name, (KindTest, unittest.TestCase), {"overrides": _overrides})
