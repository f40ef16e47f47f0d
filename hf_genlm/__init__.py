"""hf_genlm: from a folder of text to your own small generative language model.

`import hf_genlm` registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained`
loads it:

    import hf_genlm
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("my-model/model")
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_genlm.config.recipe import Recipe, load_recipe
    from hf_genlm.evaluation.metrics import metric_path
    from hf_genlm.hub.trainer_callback import PushWithCode
    from hf_genlm.model import GenLMConfig, GenLMForCausalLM, GenLMModel
    from hf_genlm.training.train import train

__version__ = "0.1.0"
_HOMES = {
    "GenLMConfig": "hf_genlm.model",
    "GenLMForCausalLM": "hf_genlm.model",
    "GenLMModel": "hf_genlm.model",
    "PushWithCode": "hf_genlm.hub.trainer_callback",
    "Recipe": "hf_genlm.config.recipe",
    "load_recipe": "hf_genlm.config.recipe",
    "metric_path": "hf_genlm.evaluation.metrics",
    "train": "hf_genlm.training.train",
}
__all__ = [
    "GenLMConfig",
    "GenLMForCausalLM",
    "GenLMModel",
    "PushWithCode",
    "Recipe",
    "load_recipe",
    "metric_path",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def _is_command_line() -> bool:
    """True if Python was started to run our command: its --help must not wait seconds for torch."""
    started = sys.orig_argv[1:]
    is_script = any(argument.rsplit("/", 1)[-1].startswith("hf-genlm") for argument in sys.argv[:1])
    return is_script or ("-m" in started and started[started.index("-m") + 1 :][:1] == ["hf_genlm"])


if not _is_command_line():
    import hf_genlm.model  # noqa: F401  registers the Auto classes
