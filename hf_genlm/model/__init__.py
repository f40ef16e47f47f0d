"""The model as the transformers library sees it. Importing this registers it with the Auto classes.

Every file here but this one travels to the Hub with a saved model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_genlm import DECODERS, MIXER_TYPES, GenLMConfig, mixers_of
from .modeling_genlm import MIXERS, GenLMForCausalLM, GenLMModel, GenLMPreTrainedModel

AutoConfig.register(GenLMConfig.model_type, GenLMConfig, exist_ok=True)
AutoModel.register(GenLMConfig, GenLMModel, exist_ok=True)
AutoModelForCausalLM.register(GenLMConfig, GenLMForCausalLM, exist_ok=True)
# AutoModelForCausalLM.register leaves this table alone, and Trainer's label smoothing reads it
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GenLMConfig.model_type] = GenLMForCausalLM.__name__

GenLMConfig.register_for_auto_class()
GenLMModel.register_for_auto_class("AutoModel")
GenLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "DECODERS",
    "MIXERS",
    "MIXER_TYPES",
    "GenLMConfig",
    "GenLMForCausalLM",
    "GenLMModel",
    "GenLMPreTrainedModel",
    "mixers_of",
]
