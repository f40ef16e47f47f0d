"""Promise: what a tracker receives stays on this machine, whatever the environment names."""

import pytest

from hf_genlm.cli.main import main
from hf_genlm.errors import UserError
from hf_genlm.training import trackers
from hf_genlm.training.trackers import check_trackers

SENDING = [
    "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID",
    "TRACKIO_WEBHOOK_URL", "TRACKIO_WRITE_TOKEN", "TRACKIO_REGISTRY_BUCKET_ID",
]  # fmt: skip


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)


@pytest.mark.parametrize("variable", SENDING)
def test_a_server_named_in_the_environment_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "somebody/else")
    with pytest.raises(UserError, match=f"{variable} sends it to a server: unset {variable}"):
        check_trackers(["tensorboard", "trackio"])
    check_trackers(["tensorboard"])


def test_before_anything_is_read_or_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/else")
    words = ["train", "--out", str(tmp_path / "run"), "--set", "training.report_to=[trackio]", "--steps", "1"]
    assert main(words) == 2
    assert "TRACKIO_SPACE_ID" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_only_of_this_machine_is_not(monkeypatch):
    for variable in ("TRACKIO_DIR", "TRACKIO_COLOR_PALETTE", "TRACKIO_PLOT_ORDER", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, "x")
    check_trackers(["trackio", "tensorboard"])


@pytest.mark.parametrize(
    "variable", ["MLFLOW_TRACKING_URI", "WANDB_API_KEY", "COMET_API_KEY", "CLEARML_API_HOST"]
)
def test_other_trackers_are_not_known(variable, monkeypatch):
    """Trainer's own integrations are off: see `report_to` of its arguments."""
    monkeypatch.setenv(variable, "https://example.org")
    for name in ("mlflow", "wandb", "all", "comet_ml"):
        with pytest.raises(UserError, match=r"unknown training\.report_to"):
            check_trackers([name])


def test_help_says_that_task_files_run_code(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["evaluate", "--help"])
    assert "their functions are executed" in " ".join(capsys.readouterr().out.split())
