"""Trainer's own `push_to_hub=True`, whole at every commit.

At a save, Trainer copies config and weights of the checkpoint to the folder that it pushes, and no code: what
lies on the Hub cannot be loaded until the last push. It also sends its arguments as a pickle.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

import hf_genlm.model
from hf_genlm.files import copy_file, write_text

_IGNORED = ".gitignore"  # of a folder that is pushed, the Hub follows it


class PushWithCode(TrainerCallback):
    """`Trainer(..., callbacks=[PushWithCode()])`: the code of our models travels with every push, and
    training_args.bin with none.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.push_to_hub and state.is_world_process_zero:
            _complete(Path(args.output_dir))

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _complete(Path(args.output_dir))


def _complete(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in Path(hf_genlm.model.__file__).parent.glob("*_genlm.py"):
        copy_file(path, folder / path.name)
    ignored = folder / _IGNORED
    rules = ignored.read_text(encoding="utf-8").splitlines() if ignored.is_file() else []
    if TRAINING_ARGS_NAME not in rules:
        write_text(ignored, "\n".join([*rules, TRAINING_ARGS_NAME]) + "\n")
