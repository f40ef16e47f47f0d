"""Truncated backpropagation through time: rows in text order, and recurrent states carried from row to row.

A batch of B rows is B sequences. Each sequence reads its own contiguous part of the text, one row a step, and
begins each row with the final states of the row before.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments

from hf_genlm.decoding.step import slots_of
from hf_genlm.errors import UserError
from hf_genlm.files import write_bytes
from hf_genlm.model import CarriedState, GenLMConfig
from hf_genlm.model.bigram_genlm import LAST_TOKEN_SLOT

STATE_FILE = "carried_state.safetensors"


class ContiguousSampler(Sampler[int]):
    """Row numbers, `n_sequences` a step.

    In step k of `n_steps`, sequence b reads row first + b * n_steps + k. The rows form a ring, as the last
    one ends with a document. Each epoch draws its `first` from `seed`, so the fewer than `n_sequences` rows
    that do not fill a step differ from epoch to epoch.

    Raises:
        UserError: less than two rows for each sequence, so that nothing would be carried.
    """

    def __init__(self, n_rows: int, n_sequences: int, seed: int):
        self.n_rows, self.n_sequences, self.seed = n_rows, n_sequences, seed
        self.n_steps = n_rows // n_sequences
        self.epoch = 0
        if self.n_steps < 2:
            raise UserError(
                f"training.carry_state = true: {n_rows} rows of text are less than two for each of the "
                f"{n_sequences} of a step; give more text, a smaller training.batch_size or a smaller "
                "training.max_seq_length"
            )

    def __len__(self) -> int:
        return self.n_steps * self.n_sequences

    def __iter__(self) -> Iterator[int]:
        first = int(np.random.default_rng((self.seed, self.epoch)).integers(self.n_rows))
        for step in range(self.n_steps):
            for sequence in range(self.n_sequences):
                yield (first + sequence * self.n_steps + step) % self.n_rows


class StateCallback(TrainerCallback):
    """The states that a Trainer carries, zero at the start of an epoch, and the `sampler` of its rows.

    The sequences of a step are those of its forward passes in order, and within a pass those of its
    processes; each process keeps the states of its own sequences.
    """

    def __init__(self, args: TrainingArguments, n_rows: int):
        self.args = args
        n_sequences = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        self.sampler = ContiguousSampler(n_rows, n_sequences, args.seed)
        self._states: list[CarriedState] = []  # of each forward pass of a step
        self._pass = 0
        self._reset()

    def add_states(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the next forward pass with its states, for rows (B, T).

        Neighbouring rows share a token, which the first row predicts and the second one reads: a row is read
        to its last token but one, (B, T - 1), and its labels come shifted.
        """
        state, self._pass = self._states[self._pass], self._pass + 1
        read = {name: inputs[name][:, :-1] for name in ("input_ids", "position_ids", "labels")}
        return {**inputs, **read, "shift_labels": inputs["labels"][:, 1:], "past_key_values": state}

    def save(self, folder: str | Path) -> None:
        """Write the states of all sequences, each (n_sequences, recurrent_size). Call it in every process."""
        written = {}
        for layer, slot in sorted(self._states[0].states):
            mine = torch.stack([state.states[layer, slot] for state in self._states])
            every = gather(mine).unflatten(0, (self.args.world_size, -1))  # processes, passes, rows of each
            written[f"{layer}.{slot}"] = every.transpose(0, 1).flatten(0, 2).contiguous().cpu()
        if self.args.process_index == 0:
            write_bytes(Path(folder) / STATE_FILE, save(written))

    def load(self, folder: str | Path, config: GenLMConfig) -> None:
        """Load the states that `save` wrote, for the same sequences in any number of processes and passes.

        Raises:
            UserError: no states in `folder`, of another number of sequences, or of another model than
                `config` describes.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise UserError(
                f"{str(folder)!r} holds no {STATE_FILE}: its run carried no states; set "
                "training.carry_state=false to resume it as it began"
            )
        self._reset()
        shape = (len(self._states), self.args.world_size, -1)
        try:
            states = load_file(path, device=str(self.args.device))
        except SafetensorError as error:
            raise UserError(
                f"{str(path)!r} cannot be read ({error}): resume from another checkpoint"
            ) from error
        found = {name: tuple(every.shape) for name, every in states.items()}
        n_sequences = self.sampler.n_sequences
        n_found = next((size[0] for size in found.values() if size), 0)
        if n_found != n_sequences:
            raise UserError(
                f"{str(path)!r} has the states of {n_found} rows a step, and this run takes {n_sequences}: "
                "keep training.batch_size times training.gradient_accumulation_steps"
            )
        expected = {
            f"{layer}.{slot}": (n_sequences, 1 if slot == LAST_TOKEN_SLOT else config.recurrent_size)
            for layer, slots in enumerate(slots_of(config))
            for slot in slots.states
        }
        if found != expected:
            raise UserError(f"{str(path)!r} has the states of another model: resume from another checkpoint")
        for name, every in states.items():
            layer, slot = map(int, name.split("."))
            mine = every.unflatten(0, shape)[:, self.args.process_index]
            for state, values in zip(self._states, mine, strict=True):
                state.states[layer, slot] = values.clone()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch, step = divmod(state.global_step, self.sampler.n_steps)
        if step == 0:  # else the run was resumed within an epoch, with loaded states
            self._reset()

    def on_step_begin(self, args, state, control, **kwargs):
        self._pass = 0

    def _reset(self) -> None:
        self._states = [CarriedState() for _ in range(self.args.gradient_accumulation_steps)]
