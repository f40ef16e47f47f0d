"""transformers' own tests, from the source distribution of the installed version.

`python tests/support/upstream.py` downloads them once to .cache/ (by pip, 11 MB); `load` imports them.
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

# Imports of the tests from files that the source distribution lacks: two mixins of tests, in place of which
# there are tests/model/test_generate.py and tests/exporting/test_export.py, and values that a config keeps.
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

# Patterns of the reasons for which one of these tests may skip; any other skip fails (tests/conftest.py).
SKIPS = {
    # features that a decoder of text does not have
    r"composite|subconfigs|sequence-to-sequence|axial RoPE": "other models",
    r"sparse experts|grouped_mm|router_logits": "other models",
    r"No conversion found": "our checkpoints have one format",
    r"_keep_in_fp32_modules": "all but counts may be in half precision; states are float32 by themselves",
    # kinds of config without attention or without rotary positions
    r"not support attentions|not output attentions|support output_attentions|support SDPA": "recurrent",
    r"not have RoPE|not support RoPE scaling": "recurrent",
    # features that our models do not offer
    r"Do not take a cache as input|Not returning cache": "no warning about the older name: both are accepted",
    r"partial rope": "whole heads are rotated",
    r"does not have position embeddings": "positions can be learned, but not resized",
    r"sliding window mask": "needs use_sliding_window; tests/model/test_mixers.py tests the window instead",
    r"TP plan": "no plan for tensor parallelism yet",
    # hardware and libraries
    r"requires (multiple )?accelerator|requires Flash Attention": "hardware",
    r"requires deepspeed|kernels library": "libraries for that hardware",
}


def fetch() -> None:
    """Download the source distribution of the installed transformers and unpack its tests."""
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
    """Import a test module by its name, such as "test_modeling_common".

    Raises:
        FileNotFoundError: the tests were not downloaded.
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
    # one of them imports transformers from the folder above its own
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return importlib.import_module(f"{PACKAGE}.{module}")


def may_skip(reason: str) -> bool:
    """True if `reason` is one of SKIPS."""
    return any(re.search(pattern, reason) for pattern in SKIPS)


if __name__ == "__main__":
    fetch()
