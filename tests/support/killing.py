"""Train small models, kill the processes at random moments, resume, and compare with an undisturbed run.

    python tests/support/killing.py FOLDER KILLS SEED

One process imports everything; each attempt is a fork of it. Prints one JSON object: the number of kills, of
kills that left a half-written checkpoint, of attempts and of runs, and whether every killed run reached the
weights and figures of the undisturbed one.
"""

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from hf_genlm.config.recipe import load_recipe
from hf_genlm.training.train import train

SETTINGS = (
    "training.steps=20",
    "training.save_steps=1",  # most of the time is spent in writing them
    "training.num_threads=1",
    "training.max_seq_length=16",
    "training.batch_size=4",
    "training.num_validations=0",
    "training.num_samples=0",
    "tokenizer.vocab_size=300",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.mixers=gated_linear,lstm",
    "model.bigram_size=64",
    "model.dropout=0.1",
    "corpus.cache=false",
)


def write_text(path: Path) -> None:
    """Write the training text."""
    lines = [f"{i} times {i % 7} is {i * (i % 7)}." for i in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")


def attempt(out: Path, text: Path, resume: bool) -> int:
    """Fork a process that trains, and return its id."""
    child = os.fork()
    if child == 0:
        recipe = load_recipe(None, SETTINGS)
        recipe.corpus.sources = [str(text)]
        try:
            train(recipe, out, resume=resume)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def outcome(run: Path) -> tuple[bytes, bytes]:
    return (run / "model" / "model.safetensors").read_bytes(), (run / "evaluation.json").read_bytes()


def main(folder: Path, n_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # a search for garbage in a fork would copy all memory that it shares
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    write_text(text)
    began = time.monotonic()
    child = attempt(folder / "undisturbed", text, resume=False)
    assert os.waitpid(child, 0)[1] == 0
    takes_s = time.monotonic() - began
    wanted = outcome(folder / "undisturbed")
    kills = half_written = attempts = n_runs = 0
    are_equal = True
    while kills < n_kills:
        run = folder / f"killed-{n_runs}"
        n_runs += 1
        while True:
            child = attempt(run, text, resume=(run / "recipe.yaml").is_file())
            attempts += 1
            if kills < n_kills:
                time.sleep(draw.uniform(0, takes_s))
                if os.waitpid(child, os.WNOHANG) == (0, 0):
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    kills += 1
                    half_written += (run / "checkpoints" / ".part").is_dir()
                    continue
            else:
                assert os.waitpid(child, 0)[1] == 0
            break
        are_equal &= outcome(run) == wanted
    print(json.dumps({"kills": kills, "half_written": half_written, "attempts": attempts, "runs": n_runs,
                      "seconds_undisturbed": round(takes_s, 2), "equal": are_equal}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
