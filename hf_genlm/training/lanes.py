"""Rows in the order of the text, and the recurrent states that go on from row to row.

A batch of B rows is B lanes, each of which walks through a part of the text of its own, one row a step, and
begins each row with the states in which it ended the one before: truncated backpropagation through time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from safetensors.torch import load_file, save
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments

from hf_genlm.errors import UserError
from hf_genlm.files import write_bytes
from hf_genlm.model import CarriedState

STATE_FILE = "carried_state.safetensors"


class LaneOrder(Sampler[int]):
    """Row numbers, `n_lanes` a step: in step k of `n_steps`, lane b reads row first + b * n_steps + k.

    The rows stand in a ring, as the last ends with a document. Each epoch draws its `first` from `seed`, so
    the fewer than `n_lanes` rows that are left over are others each time.
    """

    def __init__(self, n_rows: int, n_lanes: int, seed: int):
        """
        Raises:
            UserError: less than two rows for each lane, so that nothing would be carried.
        """
        self.n_rows, self.n_lanes, self.seed = n_rows, n_lanes, seed
        self.n_steps = n_rows // n_lanes
        self.epoch = 0
        if self.n_steps < 2:
            raise UserError(
                f"training.carry_state = true: {n_rows} rows of text are less than two for each of the "
                f"{n_lanes} of a step; give more text, a smaller training.batch_size or a smaller "
                "training.max_seq_length"
            )

    def __len__(self) -> int:
        return self.n_steps * self.n_lanes

    def __iter__(self) -> Iterator[int]:
        first = int(np.random.default_rng((self.seed, self.epoch)).integers(self.n_rows))
        for step in range(self.n_steps):
            for lane in range(self.n_lanes):
                yield (first + lane * self.n_steps + step) % self.n_rows


class Lanes(TrainerCallback):
    """The order of the rows of a Trainer, and the states of its lanes, zero at the start of an epoch.

    The lanes of a step are those of its forward passes in their order, and within each of its processes; each
    pass of each process keeps the states of its own lanes.
    """

    def __init__(self, args: TrainingArguments, n_rows: int):
        self.args = args
        n_lanes = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        self.order = LaneOrder(n_rows, n_lanes, args.seed)
        self._states: list[CarriedState] = []  # of each forward pass of a step
        self._turn = 0
        self._forget()

    def going_on(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The rows (B, T) of the next forward pass, as its states must read them, and these states.

        Neighbouring rows share a token, which the first predicts and the second reads: a row is read to its
        last token but one, (B, T - 1), and its labels come shifted.
        """
        state, self._turn = self._states[self._turn], self._turn + 1
        read = {name: inputs[name][:, :-1] for name in ("input_ids", "position_ids", "labels")}
        return {**inputs, **read, "shift_labels": inputs["labels"][:, 1:], "past_key_values": state}

    def save(self, folder: str | Path) -> None:
        """Write the states of all lanes, each (n_lanes, recurrent_size); every process calls it."""
        written = {}
        for layer, slot in sorted(self._states[0].states):
            mine = torch.stack([state.states[layer, slot] for state in self._states])
            every = gather(mine).unflatten(0, (self.args.world_size, -1))  # processes, passes, rows of each
            written[f"{layer}.{slot}"] = every.transpose(0, 1).flatten(0, 2).contiguous().cpu()
        if self.args.process_index == 0:
            write_bytes(Path(folder) / STATE_FILE, save(written))

    def load(self, folder: str | Path) -> None:
        """Go on with the states that `save` wrote, by any number of processes and passes for the same lanes.

        Raises:
            UserError: no states in `folder`, or of another number of lanes.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise UserError(
                f"{str(folder)!r} holds no {STATE_FILE}: its run carried no states; set "
                "training.carry_state=false to go on as it began"
            )
        self._forget()
        of_mine = (len(self._states), self.args.world_size, -1)
        for name, every in load_file(path, device=str(self.args.device)).items():
            if len(every) != self.order.n_lanes:
                raise UserError(
                    f"{str(path)!r} has the states of {len(every)} rows a step, and this run takes "
                    f"{self.order.n_lanes}: keep training.batch_size times "
                    "training.gradient_accumulation_steps"
                )
            layer, slot = map(int, name.split("."))
            mine = every.unflatten(0, of_mine)[:, self.args.process_index]
            for state, values in zip(self._states, mine, strict=True):
                state.states[layer, slot] = values.clone()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.epoch, step = divmod(state.global_step, self.order.n_steps)
        if step == 0:  # else a run is resumed in mid-epoch, from what was loaded
            self._forget()

    def on_step_begin(self, args, state, control, **kwargs):
        self._turn = 0

    def _forget(self) -> None:
        self._states = [CarriedState() for _ in range(self.args.gradient_accumulation_steps)]
