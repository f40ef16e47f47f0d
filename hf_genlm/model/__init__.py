"""The GenLM model for transformers. Importing this package registers it with the Auto classes.

The files `*_genlm.py`, joined to two by `bundle`, are saved with every model and uploaded to the Hub. A demo
(`hf-genlm space`) holds all files.
"""

from transformers import AutoConfig

from .bundle import write_bundle
from .cache_genlm import CarriedState
from .configuration_genlm import DECODERS, MIXER_TYPES, RECURRENT_MIXERS, GenLMConfig, mixers_of
from .modeling_genlm import (
    AUTO_CLASSES,
    MIXERS,
    GenLMForCausalLM,
    GenLMForSequenceClassification,
    GenLMForTokenClassification,
    GenLMModel,
    GenLMPreTrainedModel,
)

AutoConfig.register(GenLMConfig.model_type, GenLMConfig, exist_ok=True)
GenLMConfig.register_for_auto_class()
GenLMConfig.write_code = staticmethod(write_bundle)
for _auto, _model_class in AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_auto.__name__)

__all__ = [
    "DECODERS",
    "MIXERS",
    "MIXER_TYPES",
    "RECURRENT_MIXERS",
    "CarriedState",
    "GenLMConfig",
    "GenLMForCausalLM",
    "GenLMForSequenceClassification",
    "GenLMForTokenClassification",
    "GenLMModel",
    "GenLMPreTrainedModel",
    "mixers_of",
]
