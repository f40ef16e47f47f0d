"""transformers' own tests, from the source distribution of the installed version.

`python tests/upstream.py` fetches them once into .cache/ (pip, 11 MB); `load` imports them from there.
"""

import importlib
import re
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from unittest import mock

import transformers

FOLDER = Path(__file__).parents[2] / ".cache" / f"transformers-{transformers.__version__}"
PACKAGE = "transformers_tests"

# What the tests import from files that the source distribution leaves out: two mixins of tests, in place of
# which stand tests/test_generate.py and tests/test_export.py, and values that a config must keep.
_CONFIG_VALUES = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["AnyModel"],
    "is_encoder_decoder": False,
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "regression",
}
_ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": _CONFIG_VALUES},
}

# Every reason for which one of these tests may skip, as a pattern; any other skip fails (tests/conftest.py).
SKIPS = {
    # nothing of the kind in a decoder of text
    r"composite|subconfigs|sequence-to-sequence|axial RoPE": "other models",
    r"sparse experts|grouped_mm|router_logits": "other models",
    r"No conversion found": "our checkpoints have one format",
    r"_keep_in_fp32_modules": "all weights may be in half precision; states are float32 by themselves",
    # a kind of config that has no attention, or none that turns
    r"not support attentions|not output attentions|support output_attentions|support SDPA": "recurrent",
    r"not have RoPE|not support RoPE scaling": "recurrent",
    # what our models do not offer
    r"Do not take a cache as input|Not returning cache": "no warning of the older name: either serves",
    r"partial rope": "head_dim turns as a whole",
    r"does not have position embeddings": "positions can be learned, but not resized",
    r"sliding window mask": "asks for use_sliding_window; tests/test_mixers.py has the window's definition",
    r"TP plan": "no plan for tensor parallelism yet",
    # what this machine lacks
    r"requires (multiple )?accelerator|requires Flash Attention": "hardware",
    r"requires deepspeed|kernels library": "libraries for that hardware",
}


def fetch() -> None:
    """Download the source distribution of the installed transformers and keep its tests."""
    if FOLDER.exists():
        return
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers",
             "--dest", folder, requirement],
            check=True,
        )  # fmt: skip
        (archive,) = Path(folder).glob("transformers-*.tar.gz")
        unpacked = FOLDER.with_suffix(".partial") / PACKAGE
        unpacked.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as files:
            for member in files:
                parts = Path(member.name).parts
                if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                    (unpacked / parts[2]).write_bytes(files.extractfile(member).read())
    unpacked.parent.rename(FOLDER)


def load(module: str) -> types.ModuleType:
    """The test module `module`, for instance "test_modeling_common".

    Raises:
        FileNotFoundError: they were not fetched.
    """
    if not FOLDER.exists():
        raise FileNotFoundError(FOLDER)
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    for name, contents in _ABSENT.items():
        *parents, _ = name.split(".")
        for parent in parents:
            sys.modules.setdefault(f"{PACKAGE}.{parent}", types.ModuleType(f"{PACKAGE}.{parent}"))
        absent = types.ModuleType(f"{PACKAGE}.{name}")
        vars(absent).update(contents)
        sys.modules.setdefault(absent.__name__, absent)
    # one of them reads transformers from the folder above itself
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return importlib.import_module(f"{PACKAGE}.{module}")


def may_skip(reason: str) -> bool:
    """True if `reason` is one of SKIPS."""
    return any(re.search(pattern, reason) for pattern in SKIPS)


if __name__ == "__main__":
    fetch()
