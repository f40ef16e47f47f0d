"""Trainer callback that makes every push of `push_to_hub=True` loadable.

Trainer copies config and weights of a checkpoint into the folder that it pushes, but no code, so the
repository cannot be loaded before the last push. It also uploads its arguments as a pickle.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

import hf_genlm.model
from hf_genlm.files import copy_file, write_text


class PushWithCode(TrainerCallback):
    """Add the model's code to every push and exclude training_args.bin.

    Usage: `Trainer(..., callbacks=[PushWithCode()])`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.push_to_hub:
            self.on_push_begin(args, state, control)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(hf_genlm.model.__file__).parent.glob("*_genlm.py"):
            copy_file(path, folder / path.name)
        gitignore = folder / ".gitignore"  # the Hub skips the files that it names
        rules = gitignore.read_text(encoding="utf-8").splitlines() if gitignore.is_file() else []
        if TRAINING_ARGS_NAME not in rules:
            write_text(gitignore, "\n".join([*rules, TRAINING_ARGS_NAME]) + "\n")
