"""One decoding step of any GenLM as an ONNX graph, with its state as inputs and outputs.

    logits, state = step(token, n_before, state)

A prompt is read token by token, like generated text. Recurrent states have a fixed size; a layer with a
window keeps a ring of as many slots; a layer that attends to all earlier tokens has as many slots as the
caller gives it, at least one per token. `model.json`, beside the graph, describes every input and output.

Shapes: S slots, K key-value heads, H head_dim, R recurrent_size, V vocabulary.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_genlm.decoding.step import MOVING_ROTATIONS, SLOTS_AT_ONCE, DecodeStep, StepState, slots_of
from hf_genlm.files import write_json
from hf_genlm.model import GenLMConfig, GenLMForCausalLM

GRAPH, DESCRIPTION = "model.onnx", "model.json"
MAX_INLINE_BYTES = 1_500_000_000  # a protobuf holds 2 GiB; larger weights go to a file beside it
_OPSET = 20


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state, which begins with zeros."""

    name: str  # of the input
    like: torch.Tensor  # the shape and dtype
    grows: bool  # dimension 0 is as long as the caller wants, at least 2
    kind: str  # the mixer of its layer, "recurrent" for all with a state

    @property
    def output(self) -> str:
        """Name of the output that becomes this input at the next step."""
        return f"next.{self.name}"


def list_state(config: GenLMConfig) -> list[StateTensor]:
    """State by layer: `layers.I.keys` and `.values`, each (S, 1, K, H), or `layers.I.state.J`, (1, R)."""
    names = []
    for layer, slots in enumerate(slots_of(config)):
        parts = [f"state.{state}" for state in slots.states] or ["keys", "values"]
        names += [(f"layers.{layer}.{part}", slots.kind) for part in parts]
    buffers = StepState(config, torch.empty(0), n_rows=1, n_slots=SLOTS_AT_ONCE)
    n_masks = len(buffers.grows) - len(names)  # the graph computes the masks from n_before
    given = zip(names, buffers.buffers(SLOTS_AT_ONCE)[n_masks:], buffers.grows[n_masks:], strict=True)
    return [StateTensor(name, like, grows, kind) for (name, kind), like, grows in given]


class OnnxStep(nn.Module):
    """The decoding step as a pure function: its inputs are not changed."""

    def __init__(self, model: GenLMForCausalLM):
        super().__init__()
        self.step = DecodeStep(model)
        self.state = list_state(model.config)

    def forward(
        self, token: torch.Tensor, n_before: torch.Tensor, *state: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Read one token.

        Args:
            token: (1, 1) int64.
            n_before: (1,), number of tokens before this one.
            state: tensors as in `list_state`.

        Returns:
            (1, V) logits of the next token, and the new state.
        """
        state = tuple(tensor.clone() for tensor in state)
        # len() would make the number of slots a constant of the graph
        slots = {part.kind: tensor.shape[0] for part, tensor in zip(self.state, state, strict=True)}
        seen = [
            (torch.arange(slots[kind], device=token.device) < n_before)[:, None]
            for kind in ("full_attention", "sliding_attention")
            if kind in slots
        ]
        logits = self.step(token, n_before[None].clone(), n_before.clone(), *seen, *state)
        return (logits, *state)


def find_onnx_misfits(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str) -> list[str]:
    """Every reason, with its remedy, why a step of fixed shapes cannot give the logits of `model`."""
    rotation = model.model.rotary_emb
    if rotation is not None and rotation.rope_type in MOVING_ROTATIONS:
        return [
            f"rotary positions of the kind {rotation.rope_type} change with the length "
            "(set another rope_type in its config.json: default, linear, yarn or llama3)"
        ]
    return []


def write_onnx(
    model: GenLMForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str = "float32",
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> None:
    """Write model.onnx, model.json and the tokenizer's files.

    Weights of more than `max_inline_bytes` in all go to model.onnx.data.
    """
    n_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    is_large = n_bytes > max_inline_bytes
    program = _trace(OnnxStep(model).eval(), is_large)
    program.save(folder / GRAPH, external_data=is_large)
    write_json(folder / DESCRIPTION, describe_graph(model.config))
    tokenizer.save_pretrained(folder)


def describe_graph(config: GenLMConfig) -> dict[str, Any]:
    """Content of model.json: everything that a program needs to run the graph."""
    is_bounded = config.position_type == "learned"
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {
        "graph": GRAPH,
        "token": {"input": "token", "dtype": "int64", "shape": [1, 1]},
        "n_before": {
            "input": "n_before",
            "dtype": "int64",
            "shape": [1],
            "meaning": "number of tokens before this one",
        },
        "logits": {"output": "logits", "dtype": "float32", "shape": [1, config.vocab_size]},
        "state": [
            {
                "input": part.name,
                "output": part.output,
                "dtype": str(part.like.dtype).removeprefix("torch."),
                "shape": ["slots" if part.grows else part.like.shape[0], *part.like.shape[1:]],
            }
            for part in list_state(config)
        ],
        "start": "every state begins with zeros; 'slots' is at least 2 and at least the number of tokens",
        "max_tokens": config.max_position_embeddings if is_bounded else None,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": [token for token in ends if token is not None],
    }


def _trace(step: OnnxStep, is_large: bool) -> Any:
    # two slots at least: torch.export takes 0 and 1 for constants
    slots = torch.export.Dim("slots", min=2)
    inputs = (torch.tensor([[0]]), torch.tensor([0]), *(part.like for part in step.state))
    shapes = tuple({0: slots} if part.grows else None for part in step.state)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and onnxscript, about their own code
        logger.setLevel(logging.ERROR)
        try:
            return torch.onnx.export(
                step,
                inputs,
                dynamo=True,
                verbose=False,
                external_data=is_large,
                opset_version=_OPSET,
                input_names=["token", "n_before", *(part.name for part in step.state)],
                output_names=["logits", *(part.output for part in step.state)],
                dynamic_shapes={"token": None, "n_before": None, "state": shapes},
            )
        finally:
            logger.setLevel(level)
