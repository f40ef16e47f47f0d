"""Our figures as metrics of the library evaluate, loaded from this package without a network.

    import evaluate, hf_genlm
    evaluate.load(hf_genlm.metric_path("distinct_n")).compute(predictions=["a b a", "b a"])

Each folder holds a script of its name, which evaluate copies to its cache and runs. The scripts describe
inputs and outputs; what they compute stands in `hf_genlm.evaluation`.
"""

from pathlib import Path

from hf_genlm.errors import UserError, did_you_mean

_FOLDER = Path(__file__).parent


def metric_names() -> list[str]:
    """What `metric_path` knows, in alphabetical order."""
    return sorted(script.stem for script in _FOLDER.glob("*/*.py") if script.stem == script.parent.name)


def metric_path(name: str) -> str:
    """What `evaluate.load` takes to load the metric `name` from this package.

    Raises:
        UserError: there is no such metric.
    """
    names = metric_names()
    if name not in names:
        raise UserError(f"no metric {name!r}{did_you_mean(name, names)}")
    return str(_FOLDER / name)
