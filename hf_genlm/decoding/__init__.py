"""Fast generation by a traced or compiled step of static shapes, with the same tokens as `generate`.

    from hf_genlm.decoding import FastGenerator

    fast = FastGenerator(model)                       # traced: ready in 0.5 s, needs no compiler
    fast = FastGenerator(model, program="compiled")   # cached on disk for all models of this shape
    fast.generate(**prompt, max_new_tokens=256)       # takes what model.generate takes

Whatever the step cannot do, the model's own `generate` does.
"""

import contextlib
from functools import partial
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hf_genlm.decoding.step import (
    MOVING_ROTATIONS,
    PROGRAMS,
    SLOTS_AT_ONCE,
    DecodeStep,
    Program,
    StepState,
    has_program,
    program_file,
)
from hf_genlm.errors import UserError
from hf_genlm.model import GenLMConfig, GenLMForCausalLM
from hf_genlm.model.cache_genlm import CACHE
from hf_genlm.model.recurrence_genlm import is_plain_linear

# arguments of generate that the fast loop does not support
_NOT_FAST = (
    "assistant_model", "custom_generate", "synced_gpus", "inputs_embeds", "past_key_values", "cache",
    "position_ids", "negative_prompt_ids", "tokenizer",  # generate loses it beside a loop of ours
)  # fmt: skip
_OWN_INPUTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}
_KNOWN_MODULES = ("hf_genlm.model.", "torch.nn.modules.", "transformers.activations")


class _NotFast(Exception):
    """The reason for which the model's own generate is used."""


class FastGenerator:
    """Generate with a traced or compiled decoding step, without the overhead of Python in the model.

    Supports greedy search and sampling with all logits processors and stopping criteria of generate, batches,
    left padding and streamers. `model.generate` does everything else; `plain_because` is then the reason, and
    None otherwise.

    Args:
        model: in eval mode. With adapters, quantized weights or hooks, its own generate is used. Its weights
            are shared, not copied.
        program: "traced" (0.5 s, any machine), "compiled" (tens of seconds once per shape, then from disk),
            "module" (neither). Default: compiled if it is on disk, otherwise traced.
        int8: 8-bit matrices, copied from the model at first use; the tokens may differ from the model's own.

    Raises:
        UserError: `program` is unknown; `int8` is asked of a model that is not in float32 on a CPU, or of a
            request that is not for the step; in `generate`: a compiled program needs a C++ compiler.
    """

    def __init__(self, model: GenLMForCausalLM, program: str | None = None, int8: bool = False):
        if program is not None and program not in PROGRAMS:
            raise UserError(f"unknown program {program!r}; known: {', '.join(PROGRAMS)}")
        weight = next(model.parameters())
        if int8 and (weight.dtype, weight.device.type) != (torch.float32, "cpu"):
            raise UserError(
                f"int8 weights are made of float32 on a CPU, not {weight.dtype} on {weight.device.type}"
            )
        self.model, self.program, self.int8 = model, program, int8
        self.plain_because: str | None = None
        self._weights: tuple[int, ...] = ()
        self._programs: dict[int, Program] = {}

    def generate(self, inputs: torch.Tensor | None = None, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate; arguments and results are those of `model.generate`."""
        try:
            configs = (self.model.generation_config, kwargs.get("generation_config"))
            ours = _with_stop_criterion(kwargs, *configs)
            _check_arguments(ours)
            _check_model(self.model)
            self.plain_because = None
            loop = partial(self._decode, streamer=streamer)
            return self.model.generate(inputs, custom_generate=loop, **ours)
        except _NotFast as reason:
            if self.int8:
                raise UserError(f"int8 weights cannot be used here: {reason}") from reason
            self.plain_because = str(reason)
            return self.model.generate(inputs, streamer=streamer, **kwargs)

    def _decode(
        self,
        model: Any,  # a GenLMForCausalLM; transformers types _prefill for a protocol
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Run the loop of GenerationMixin._sample, (B, T) to (B, T + new), after generate's preparations."""
        _check_request(model.config, generation_config, model_kwargs)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        rows = _Rows(input_ids, generation_config, stopping_criteria)
        state, position, slot = _state_after(input_ids, model, model_kwargs)
        buffers = state.buffers(rows.n_tokens + 1)
        step, counts = None, _Counts(model, model_kwargs[CACHE])
        while True:
            scores = logits.float()
            if logits_processor:
                scores = logits_processor(rows.ids, scores.clone())
            if generation_config.do_sample:
                token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            token = rows.append(token)
            if streamer is not None:
                streamer.put(token[:, 0].cpu())
            if rows.all_ended(token):
                break
            if (rows.n_tokens - 1) % SLOTS_AT_ONCE == 0:
                buffers = state.buffers(rows.n_tokens)
            if step is None:
                step = self._program_for(token, position, slot, *buffers)
            logits = counts.mixed(step(token, position, slot, *buffers), token)
        if streamer is not None:
            streamer.end()
        return rows.ids

    def _program_for(self, *inputs: torch.Tensor) -> Program:
        """The program for this number of rows and the current weights of the model."""
        weights = tuple(weight.data_ptr() for weight in self.model.parameters())
        if self.int8:  # copies must follow in-place updates of the weights
            weights += tuple(weight._version for weight in self.model.parameters())
        if weights != self._weights:
            self._weights, self._programs = weights, {}
        n_rows = len(inputs[0])
        if n_rows not in self._programs:
            self._programs[n_rows] = self._build(inputs)
        return self._programs[n_rows]

    def _build(self, inputs: tuple[torch.Tensor, ...]) -> Program:
        weight = self.model.lm_head.weight
        # in fewer bits, another order of summation gives other results
        is_exact = weight.dtype in (torch.float32, torch.float64)
        row_sums = len(inputs[0]) == 1 and is_exact and weight.device.type == "cpu"
        as_compiled = DecodeStep(self.model, row_sums=row_sums, int8=self.int8)
        program = self.program
        if program is None:
            program = "traced"
            with contextlib.suppress(UserError):  # this user has no cache folder
                program = "compiled" if has_program(program_file(as_compiled, inputs)) else "traced"
        step = as_compiled if program == "compiled" else DecodeStep(self.model, int8=self.int8)
        return PROGRAMS[program](step, inputs)


class _Counts:
    """The counts of a model, if it has some, and the last words of each row in a prompt's `cache`."""

    def __init__(self, model: GenLMForCausalLM, cache: Any):
        self.mixture = model.mixture
        self.contexts = None if self.mixture is None else cache.layers[-1].recurrent_states[0]

    @torch.no_grad()
    def mixed(self, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the model after `token` (B, 1), from what the step gives."""
        if self.mixture is None:
            return logits
        self.contexts = torch.cat([self.contexts[:, 1:], token + 1], dim=1)
        n_units = self.mixture.of_state.out_features
        return self.mixture.mix(logits[:, :-n_units], logits[:, -n_units:], self.contexts)


class _Rows:
    """Tokens of a batch, and the rows that have ended."""

    def __init__(
        self, ids: torch.Tensor, generation_config: GenerationConfig, criteria: StoppingCriteriaList
    ):
        self._ids = ids.new_empty(len(ids), 2 * ids.shape[1] + SLOTS_AT_ONCE)
        self._ids[:, : ids.shape[1]] = ids
        self.n_tokens = ids.shape[1]
        self._ended = [False] * len(ids)
        self._pad = None  # as in generate, without an eos criterion rows are not padded after their end
        if any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            self._pad = generation_config._pad_token_tensor
        self._max_length, self._ends, self._others = None, set(), StoppingCriteriaList()
        for criterion in criteria:  # the two common ones are evaluated without tensors
            if type(criterion) is MaxLengthCriteria:
                self._max_length = criterion.max_length
            elif type(criterion) is EosTokenCriteria:
                self._ends.update(criterion.eos_token_id.tolist())
            else:
                self._others.append(criterion)

    @property
    def ids(self) -> torch.Tensor:
        """All tokens so far, (B, n_tokens)."""
        return self._ids[:, : self.n_tokens]

    def append(self, token: torch.Tensor) -> torch.Tensor:
        """Append (B, 1), replaced by padding in rows that have ended; return what was appended."""
        if self._pad is not None and any(self._ended):
            ended = torch.tensor(self._ended, device=token.device)[:, None]
            token = torch.where(ended, self._pad.to(token.device), token)
        if self.n_tokens == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids)], dim=1)
        self._ids[:, self.n_tokens : self.n_tokens + 1] = token
        self.n_tokens += 1
        return token

    def all_ended(self, token: torch.Tensor) -> bool:
        """True if every row has ended with its last `token` (B, 1)."""
        if self._ends:
            for row, last in enumerate(token[:, 0].tolist()):
                self._ended[row] |= last in self._ends
        if self._others:
            for row, ends in enumerate(self._others(self.ids, None).tolist()):
                self._ended[row] |= ends
        return all(self._ended) or (self._max_length is not None and self.n_tokens >= self._max_length)


def _state_after(
    input_ids: torch.Tensor, model: GenLMForCausalLM, model_kwargs: dict[str, Any]
) -> tuple[StepState, torch.Tensor, torch.Tensor]:
    """The state after the prompt, the position of the next token (B, 1) and its slot (1,)."""
    n_rows, n_tokens = input_ids.shape
    state = StepState(model.config, model.lm_head.weight, n_rows, n_tokens + SLOTS_AT_ONCE)
    mask = model_kwargs.get("attention_mask")
    valid = torch.ones_like(input_ids) if mask is None else mask
    state.fill(model_kwargs[CACHE], valid.bool())
    position = (model_kwargs["position_ids"][:, -1:] + 1).expand(n_rows, 1).clone()
    return state, position, torch.tensor([n_tokens], device=input_ids.device)


def _with_stop_criterion(arguments: dict[str, Any], *configs: Any) -> dict[str, Any]:
    """Replace `stop_strings` and `tokenizer`, if both are given, by the criterion that generate builds.

    Token healing needs the tokenizer itself.
    """
    is_healing = any(getattr(config, "token_healing", False) for config in configs) or arguments.get(
        "token_healing"
    )
    if is_healing or not arguments.get("stop_strings") or arguments.get("tokenizer") is None:
        return arguments
    others = dict(arguments)
    criterion = StopStringCriteria(others.pop("tokenizer"), others.pop("stop_strings"))
    criteria = [*(others.pop("stopping_criteria", None) or []), criterion]
    return {**others, "stopping_criteria": StoppingCriteriaList(criteria)}


def _check_arguments(arguments: dict[str, Any]) -> None:
    given = [name for name in _NOT_FAST if arguments.get(name) is not None]
    if given:
        raise _NotFast(f"{given[0]} was given")


def _check_model(model: torch.nn.Module) -> None:
    """Check that the model is as its class builds it: hooks and adapters must not be bypassed."""
    if type(model) is not GenLMForCausalLM:
        raise _NotFast(f"the model is a {type(model).__name__}")
    if model.config.is_ngram:
        raise _NotFast("it looks its counts up")
    if model.mixture is not None and model.config.final_logit_softcapping is not None:
        raise _NotFast("its logits are bounded beside counts")
    if model.training:
        raise _NotFast("the model is in training mode")
    rotation = model.model.rotary_emb
    if rotation is not None and rotation.rope_type in MOVING_ROTATIONS:
        raise _NotFast("the rotary positions change with the length")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise _NotFast(f"the attention implementation is {model.config._attn_implementation}")
    for name, module in model.named_modules():
        is_ours = type(module).__module__.startswith(_KNOWN_MODULES)
        is_plain = not isinstance(module, torch.nn.Linear) or is_plain_linear(module)
        is_hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        if not is_ours or not is_plain or is_hooked:
            raise _NotFast(f"{name or 'the model'} ({type(module).__name__}) has been modified")
    for name, weight in model.named_parameters():
        if type(weight) not in (torch.nn.Parameter, torch.Tensor) or weight.device != model.device:
            raise _NotFast(f"{name} is not a plain tensor on {model.device}")


def _check_request(
    config: GenLMConfig, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    n_positions = config.max_position_embeddings
    if config.position_type == "learned" and (generation_config.max_length or 0) > n_positions:
        raise _NotFast(f"the text may exceed the {n_positions} learned positions")
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise _NotFast(f"the generation mode is {mode.value}")
    for name in ("return_dict_in_generate", "cache_implementation"):
        if getattr(generation_config, name):
            raise _NotFast(f"{name} is set")
    if not generation_config.use_cache:
        raise _NotFast("use_cache is off")
    more = [name for name, value in model_kwargs.items() if name not in _OWN_INPUTS and value is not None]
    if more:
        raise _NotFast(f"{more[0]} was given")
