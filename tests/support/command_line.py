"""Helpers shared by tests: command line."""

import pytest
from support.runs import SMALL

from hf_genlm.cli.main import main
from hf_genlm.run_folder import RunFolder

SMALL_OPTIONS = [word for assignment in SMALL for word in ("--set", assignment)]


def last_line(capsys) -> str:
    """The error on stderr: one line of ours, the last one, and no traceback before it."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith("hf-genlm: ") for line in lines].index(True) == len(lines) - 1, lines
    assert "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.fixture(scope="session")
def trained(text_folder, tmp_path_factory):
    """A run folder made by the command."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--decoder", "gru", *SMALL_OPTIONS, "--set", "training.num_samples=2"]
    assert main(["train", str(text_folder), "--out", str(out), *options]) == 0
    return RunFolder.open(out)
