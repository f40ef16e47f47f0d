"""GGUF files, the format of llama.cpp: weights, config and tokenizer in one file.

Keys, tensor names, the order of rotated pairs and the pre-tokenizers are those of docs/ and
src/llama-vocab.cpp in github.com/ggml-org/llama.cpp.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_genlm.exporting.layouts import LAYOUTS, Layout, convert, find_misfits
from hf_genlm.model import GenLMConfig, GenLMForCausalLM
from hf_genlm.text.tokenizer import PATTERNS, pre_tokenizer

# dtype of matrices -> (its word in a file name, its llama.cpp file type); vectors stay in float32
DTYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
_BLOCK = 32  # weights of a row that share a scale in q8_0
# tokenizer.pattern -> llama.cpp's name of the same pre-tokenizer; it has none for "own"
_PRE_TOKENIZERS = {"gpt2": "gpt-2", "qwen35": "qwen35"}
# matrix or norm of a layer in transformers -> its name in llama.cpp
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
    """Name of the file, as llama.cpp's own converter gives it."""
    return f"model-{DTYPES[dtype][0]}.gguf"


def choose_layout(config: GenLMConfig) -> tuple[str, Layout]:
    """(llama.cpp's architecture with this kind of attention, its row of `LAYOUTS`)."""
    architecture = "qwen3" if config.qk_norm else "llama"
    return architecture, LAYOUTS[architecture]


def find_gguf_misfits(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str) -> list[str]:
    """Every reason why llama.cpp would not give the logits of `model` or the ids of `tokenizer`."""
    config = model.config
    _, layout = choose_layout(config)
    in_llama_cpp = replace(layout, has_window=False, has_rope_scaling=False, activation="silu")
    found = find_misfits(model, in_llama_cpp)
    sizes = (config.intermediate_size, config.num_attention_heads, config.head_dim)
    mlp_width, n_heads, head_dim = (size or 0 for size in sizes)  # no None: the config derives them
    widths = (config.hidden_size, mlp_width, n_heads * head_dim)
    if dtype == "q8_0" and any(width % _BLOCK for width in widths):
        found.append(
            f"q8_0 needs widths that are multiples of {_BLOCK}, and these are {', '.join(map(str, widths))} "
            "(export with --dtype float16)"
        )
    state = _tokenizer_state(tokenizer)
    if state["model"]["type"] != "BPE" or state["normalizer"] is not None:
        found.append("the tokenizer is no byte-level BPE (train with one made by hf-genlm)")
    elif _pattern_of(state) not in _PRE_TOKENIZERS:  # llama.cpp knows pre-tokenizers by name, not by pattern
        found.append(
            "llama.cpp has no pre-tokenizer that splits words like this one; the nearest, llama-bpe, splits "
            "marks from letters, numbers from the space before them, indentation from the line end before it "
            "(train with tokenizer.pattern=gpt2, or qwen35, which keeps marks with their letters)"
        )
    return found


def write_gguf(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """Write the file to `folder`; `find_gguf_misfits` must find nothing."""
    architecture, layout = choose_layout(model.config)
    write_converted(convert(model, layout), folder / file_name(dtype), architecture, tokenizer, dtype)


def write_converted(
    model: PreTrainedModel,
    file: Path,
    architecture: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
) -> None:
    """Write a model of transformers' own class, a row of `LAYOUTS`; without a tokenizer it takes only ids."""
    import gguf

    writer = gguf.GGUFWriter(str(file), architecture)
    _add_config(writer, model.config, getattr(gguf.LlamaFileType, DTYPES[dtype][1]))
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    for name, weight in _tensors(model, rotates_neighbours=architecture == "llama"):
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


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Content of its tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _pattern_of(state: dict[str, Any]) -> str | None:
    """The tokenizer.pattern (a row of `PATTERNS`) of a tokenizer's JSON; None if it has another one."""
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
    """Add vocabulary, merges and special tokens; a text begins with bos, as in `hf-genlm generate`."""
    import gguf

    state = _tokenizer_state(tokenizer)
    word_of = {number: word for word, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    kinds = {
        None: gguf.TokenType.NORMAL,
        True: gguf.TokenType.CONTROL,
        False: gguf.TokenType.USER_DEFINED,
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    pattern = _pattern_of(state)
    assert pattern is not None, "find_gguf_misfits found nothing"
    writer.add_tokenizer_pre(_PRE_TOKENIZERS[pattern])
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


def _tensors(model: PreTrainedModel, rotates_neighbours: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(name in llama.cpp, weight). Its Llama rotates neighbouring pairs of a head, transformers' rotates the
    first half with the second, so the rows of queries and keys are reordered."""
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
            if weight is None:  # norms of queries and keys, which a Llama lacks
                continue
            if rotates_neighbours and theirs in heads:
                halves = weight.reshape(heads[theirs], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
            yield f"blk.{layer}.{theirs}.weight", weight


def read_back(folder: Path, model: GenLMForCausalLM, dtype: str) -> PreTrainedModel:
    """Load the file by transformers: weights, rotary base, norm epsilon and sizes are those of the file.

    Only head_dim is given: transformers does not read that of a Qwen3.
    """
    _, layout = choose_layout(model.config)
    config = AutoConfig.from_pretrained(folder, gguf_file=file_name(dtype), trust_remote_code=False)
    config.head_dim = model.config.head_dim
    return layout.model_class.from_pretrained(
        folder, gguf_file=file_name(dtype), config=config, dtype=torch.float32
    ).eval()
