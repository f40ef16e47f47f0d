"""Export a trained model to the formats of other runtimes: Llama, Qwen3, GGUF (llama.cpp) and ONNX.

An export computes the logits of the model, or is refused with every reason. Importing this package loads
neither torch nor transformers, so that `onnx_runner` works without them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_genlm.exporting.targets import Comparison
    from hf_genlm.run_folder import Listener


def export(
    model: str | Path,
    *,
    to: str,
    output_dir: str | Path,
    dtype: str | None = None,
    allow: Sequence[str] = (),
    listener: "Listener | None" = None,
) -> "Comparison":
    """Write `model` in another format to the new folder `output_dir`.

    Args:
        model: a run folder, a model folder or a Hub id.
        to: "llama", "qwen3", "gguf" or "onnx"; a row of `targets.EXPORTS`.
        dtype: of the weights, one that the format has; None: float32.
        allow: findings in the model's files and card that may leave, as `README.md:home-path`.
        listener: called with (event, fields) for the event "progress".

    Returns:
        The logits of the written export compared with those of the model.

    Raises:
        UserError: an unknown format or dtype, a model that does not fit it, a library that is not installed,
            a folder that already holds files, or model files that hold something that must not be published.
    """
    from hf_genlm.loading import load, source_of

    source = Path(source_of(str(model)))  # a wrong name is refused before torch is loaded
    from hf_genlm.exporting.targets import export_model, select_target
    from hf_genlm.files import require_new_folder
    from hf_genlm.hub.manifest import MODEL_FILES, ModelSource, build_manifest, check_findings

    def report(task: str) -> None:
        if listener is not None:
            listener("progress", {"task": task, "done": 0, "total": None})

    select_target(to, dtype)
    require_new_folder(output_dir)
    if source.is_dir():
        check_findings([build_manifest(ModelSource.find(source), ("README.md", *MODEL_FILES))], allow)
    report("loading the model")
    loaded, tokenizer = load(str(model))
    report(f"writing and comparing ({to})")
    card = source / "README.md" if source.is_dir() else None
    return export_model(loaded, tokenizer, to, Path(output_dir), dtype, card=card)
