"""Script of each process in the tests of several processes: train the jobs that a JSON file lists.

A job is {"name", "assignments", "sharded"}; its run folder is NAME beside the file. With "resumes" it resumes
that run, and with "ends_at" the process ends after the checkpoint of that step.
"""

import json
import os
import sys
from pathlib import Path

from hf_genlm.config.recipe import load_recipe
from hf_genlm.training import trainer
from hf_genlm.training.processes import index, is_first
from hf_genlm.training.train import train

# as recipes/accelerate/fsdp2_cpu.yaml
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "GenLMDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(jobs: list[dict], folder: Path) -> None:
    for job in jobs:
        for name, value in SHARDED.items():
            os.environ.pop(name, None)
            if job["sharded"]:
                os.environ[name] = value
        recipe, resumes = load_recipe(None, job["assignments"]), job.get("resumes", False)
        train(recipe, folder / job["name"], listener=ending_at(job.get("ends_at")), resume=resumes)


def ending_at(step: int | None):
    """Return a listener that ends the process after the checkpoint of `step`."""

    def hear(event: str, fields: dict) -> None:
        if event == "checkpoint" and fields["step"] == step:
            os._exit(1)

    return hear


def note_what_trains(folder: Path) -> None:
    """Record the classes of each trained model and of its parameters, in one file for each process."""
    whole_model = trainer.BudgetTrainer.whole_model

    def noting(self):
        kinds = sorted({type(parameter).__name__ for parameter in self.model_wrapped.parameters()})
        with (folder / f"trained-{index()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([type(self.model_wrapped).__name__, *kinds]) + "\n")
        return whole_model(self)

    trainer.BudgetTrainer.whole_model = noting


if __name__ == "__main__":
    file = Path(sys.argv[1])
    note_what_trains(file.parent)
    run(json.loads(file.read_text(encoding="utf-8")), file.parent)
    if is_first():
        print("done")
