"""From a folder of text to your own small generative language model.

Train on files, folders, Hub datasets, strings or a `datasets.Dataset`, and look at the result:

    import hf_genlm
    run = hf_genlm.train("texts/", decoder="lstm", minutes=10, output_dir="lstm-10")
    run.metrics["bits_per_byte"]          # value, unit, count, standard error, 95 % interval
    model, tokenizer = run.load_model(), run.load_tokenizer()
    print(hf_genlm.generate(run, "Once upon a time"))

The verbs of the command line are functions of the same names: `train`, `tokenizer`, `extend`, `evaluate`,
`audit`, `compare`, `generate`, `export`, `push` and `plot`. `write_card`, `measure_range`, `write_space` and
`list_runs` do the work of `card`, `range`, `space` and `runs`. `hf-genlm settings` lists every field of a
recipe.

A trained model is an ordinary transformers model. `import hf_genlm`, in any order with transformers,
registers it:

    import hf_genlm
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("lstm-10/model")

Registration needs the model classes, and these need torch: so `import hf_genlm` takes as long as `import
torch` and `import transformers` together. The command line answers `--help` in a fraction of that time.
Therefore torch is not imported while Python imports this package only to reach the module `hf_genlm.cli` or
`hf_genlm.__main__`; the import system's frames on the stack name the module that was asked for. The name of
the program and its arguments play no part.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_genlm.api import Run, generate, tokenizer, train
    from hf_genlm.api import audit_and_draw as audit
    from hf_genlm.card import write_card
    from hf_genlm.comparison import compare
    from hf_genlm.config.recipe import Recipe, load_recipe
    from hf_genlm.errors import Stopped, UserError
    from hf_genlm.evaluation.evaluate import evaluate
    from hf_genlm.evaluation.measurement import Measurement
    from hf_genlm.evaluation.metrics import metric_path
    from hf_genlm.exporting import export
    from hf_genlm.extension import extend
    from hf_genlm.hub.push import push
    from hf_genlm.loading import load
    from hf_genlm.long_range import measure_range
    from hf_genlm.model import GenLMConfig, GenLMForCausalLM, GenLMModel
    from hf_genlm.report.curves import plot
    from hf_genlm.run import list_runs
    from hf_genlm.space.build import build_space as write_space
    from hf_genlm.training.callbacks import PushWithCode

__version__ = "0.1.0"
_HOMES = {
    "hf_genlm.api": ("Run", "generate", "tokenizer", "train"),
    "hf_genlm.config.recipe": ("Recipe", "load_recipe"),
    "hf_genlm.errors": ("Stopped", "UserError"),
    "hf_genlm.evaluation.measurement": ("Measurement",),
    "hf_genlm.evaluation.metrics": ("metric_path",),
    "hf_genlm.training.callbacks": ("PushWithCode",),
    "hf_genlm.loading": ("load",),
    "hf_genlm.model": ("GenLMConfig", "GenLMForCausalLM", "GenLMModel"),
    "hf_genlm.run": ("list_runs",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "GenLMConfig", "GenLMForCausalLM", "GenLMModel", "Measurement", "PushWithCode", "Recipe", "Run",
    "Stopped", "UserError", "audit", "compare", "evaluate", "export", "extend", "generate", "list_runs",
    "load", "load_recipe", "measure_range", "metric_path", "plot", "push", "tokenizer", "train", "write_card",
    "write_space",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name in __all__:
        value = import_module("hf_genlm.api").service(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"import_module", "sys", "Any", "TYPE_CHECKING"})


def _is_imported_for_command_line() -> bool:
    """Return True if the import in progress asked for a module of the command line."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib", "runpy"):
            name = str(frame.f_locals.get("name") or frame.f_locals.get("mod_name"))
            if name == "hf_genlm.__main__" or name.startswith("hf_genlm.cli"):
                return True
    return False


if not _is_imported_for_command_line():
    from hf_genlm.errors import quiet_libraries

    with quiet_libraries():
        import hf_genlm.model  # noqa: F401  registers the Auto classes
