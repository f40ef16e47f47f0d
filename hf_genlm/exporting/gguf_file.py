"""A GGUF file, the format of llama.cpp: weights, config and tokenizer in one.

Names of keys and tensors, the order of rotated pairs and the pre-tokenizers are those of llama.cpp's
documentation and loader (docs/ and src/llama-vocab.cpp of github.com/ggml-org/llama.cpp).
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_genlm.exporting.layouts import LAYOUTS, Layout, convert, misfits_of
from hf_genlm.exporting.misfits import Misfit
from hf_genlm.model import GenLMConfig, GenLMForCausalLM
from hf_genlm.text.tokenizer import PATTERNS, pre_tokenizer

# word of --dtype -> the type of matrices; vectors stay in float32
DTYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
_BLOCK = 32  # weights of a row that share a scale in q8_0
# recipe word -> llama.cpp's name for the same pre-tokenizer; it has none for our own
_PRE_TOKENIZERS = {"gpt2": "gpt-2", "qwen35": "qwen35"}
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def file_name(dtype: str) -> str:
    """As llama.cpp's own converter calls it."""
    return f"model-{DTYPES[dtype]}.gguf"


def architecture_of(config: GenLMConfig) -> str:
    """The one of llama.cpp's architectures that has this kind of attention; a row of `LAYOUTS`."""
    return "qwen3" if config.qk_norm else "llama"


def layout_of(config: GenLMConfig) -> Layout:
    """What llama.cpp computes of `architecture_of`."""
    layout = LAYOUTS[architecture_of(config)]
    return replace(layout, has_window=False, has_rope_scaling=False, activation="silu")


def misfits_of_gguf(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str) -> list[Misfit]:
    """Every reason why llama.cpp would not give the logits of `model`, or not the ids of `tokenizer`."""
    config = model.config
    found = misfits_of(model, layout_of(config))
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    if dtype == "q8_0" and any(width % _BLOCK for width in widths):
        reason = (
            f"q8_0 needs widths that are multiples of {_BLOCK}, and these are {', '.join(map(str, widths))}"
        )
        found.append(Misfit(reason, "export with --dtype float16"))
    return found + _misfits_of_tokenizer(tokenizer)


def write_gguf(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """The file alone; `misfits_of_gguf` must find nothing."""
    architecture = architecture_of(model.config)
    converted = convert(model, LAYOUTS[architecture])
    write_converted(converted, folder / file_name(dtype), architecture, tokenizer, dtype)


def write_converted(
    model: PreTrainedModel,
    file: Path,
    architecture: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
) -> None:
    """A model of transformers' own class for a row of `LAYOUTS`; without a tokenizer it takes ids alone."""
    import gguf

    writer = gguf.GGUFWriter(str(file), architecture)
    _add_config(writer, model.config, getattr(gguf.LlamaFileType, _FILE_TYPES[dtype]))
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    for name, weight in _tensors(model, turns_neighbours=architecture == "llama"):
        if weight.ndim < 2 or dtype == "float32":
            writer.add_tensor(name, weight)
        elif dtype == "float16":
            writer.add_tensor(name, weight.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def _misfits_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Misfit]:
    """llama.cpp knows pre-tokenizers by name, not by their pattern."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state["normalizer"] is not None:
        return [Misfit("the tokenizer is no byte-level BPE", "train with one that hf-genlm makes")]
    if _pattern_of(state) in _PRE_TOKENIZERS:
        return []
    return [
        Misfit(
            "llama.cpp has no pre-tokenizer that parts words as this one; the nearest, llama-bpe, cuts marks "
            "from letters, numbers from the space before them, indentation from the line end before it",
            "train with tokenizer.pattern=gpt2, or qwen35, which keeps marks with their letters",
        )
    ]


def _pattern_of(state: dict[str, Any]) -> str | None:
    """The row of `PATTERNS` by which the tokenizer of this JSON parts words."""
    for word, pattern in PATTERNS.items():
        if state["pre_tokenizer"] == json.loads(pre_tokenizer(pattern).__getstate__()):
            return word
    return None


def _add_config(writer: Any, config: Any, file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Vocabulary, merges and special tokens; a text begins with bos, as `hf-genlm generate` has it."""
    import gguf

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    word_of = {number: word for word, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    kinds = {
        None: gguf.TokenType.NORMAL,
        True: gguf.TokenType.CONTROL,
        False: gguf.TokenType.USER_DEFINED,
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(_PRE_TOKENIZERS[_pattern_of(state)])
    writer.add_token_list([word_of.get(number, f"[UNUSED{number}]") for number in range(vocab_size)])
    writer.add_token_types(
        [
            kinds[added.get(number)] if number in word_of else gguf.TokenType.UNUSED
            for number in range(vocab_size)
        ]
    )
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel, turns_neighbours: bool) -> Iterator[tuple[str, np.ndarray]]:
    """By llama.cpp's names. Its Llama turns neighbouring pairs of a head, transformers' the two halves."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output.weight", weights["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _TENSORS.items():
            weight = weights.get(f"model.layers.{layer}.{ours}.weight")
            if weight is None:  # the norms of queries and keys
                continue
            if turns_neighbours and theirs in heads:
                halves = weight.reshape(heads[theirs], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
            yield f"blk.{layer}.{theirs}.weight", weight


def read_back(folder: Path, model: GenLMForCausalLM, dtype: str) -> PreTrainedModel:
    """The file as transformers reads it, which knows no head_dim of llama.cpp's Qwen3: it gets the config."""
    layout = LAYOUTS[architecture_of(model.config)]
    config = convert(model, layout).config
    return layout.model_class.from_pretrained(
        folder, gguf_file=file_name(dtype), config=config, dtype=torch.float32
    ).eval()
