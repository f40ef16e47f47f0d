"""Conversion of a decoder of attention layers to a plain Llama or Qwen3 of transformers with equal logits.

Folded, exactly except for the rounding of products: the embedding E W + b to one table, and the head tied
through W to E W; a product of two matrices in the MLP to one; layers that share weights to copies; and the
squared ReLU to a gated ReLU with one matrix twice, relu(W x) * (W x) = relu(W x)^2.

Shapes: V vocabulary, D hidden_size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_genlm.model import GenLMConfig, GenLMForCausalLM
from hf_genlm.model.configuration_genlm import ATTENTION_MIXERS
from hf_genlm.model.mlp_genlm import GenLMLowRankLinear


@dataclass(frozen=True)
class Layout:
    """A model class of transformers, and the variants of it that a runtime computes."""

    name: str
    config_class: Callable[..., PreTrainedConfig]
    model_class: type[PreTrainedModel]
    has_qk_norm: bool
    has_window: bool = False
    has_rope_scaling: bool = True
    activation: str | None = None  # of a gated MLP, the only kind; None: any activation, gated or not


LAYOUTS = {
    "llama": Layout("Llama", LlamaConfig, LlamaForCausalLM, has_qk_norm=False),
    "qwen3": Layout("Qwen3", Qwen3Config, Qwen3ForCausalLM, has_qk_norm=True, has_window=True),
}


def find_misfits(model: GenLMForCausalLM, layout: Layout) -> list[str]:
    """Every reason, with its remedy, why `layout` cannot give the logits of `model`; empty if it can."""
    config, bias = model.config, model.lm_head.bias
    mixers = config.mixer_types or []
    other = "qwen3" if config.qk_norm else "llama"
    foreign = sorted(set(mixers) - set(ATTENTION_MIXERS))
    windows = "sliding_attention" in mixers and not layout.has_window
    rope = config.rope_parameters["rope_type"] if config.has_rotary_positions else "default"
    gates = config.gated_mlp and layout.activation in (None, config.hidden_act)
    folds = not config.gated_mlp and config.hidden_act == "relu2" and layout.activation is None
    act = layout.activation or config.hidden_act
    rules = (
        (
            bool(foreign),
            f"{' and '.join(foreign)} layers, where {layout.name} has only attention",
            "train with --decoder transformer, or export --to onnx, which takes every model",
        ),
        (
            windows,
            f"layers with a window of {config.sliding_window} tokens, which {layout.name} lacks",
            "train with --decoder transformer, or export with model.qk_norm=true --to qwen3",
        ),
        (
            not foreign and config.qk_norm != layout.has_qk_norm,
            f"queries and keys are {'' if config.qk_norm else 'not '}normalised",
            f"export --to {other}, or train with model.qk_norm={str(layout.has_qk_norm).lower()}",
        ),
        (
            not gates and not folds,
            f"the MLP is {config.hidden_act} with{'' if config.gated_mlp else 'out'} a gate",
            f"train with model.gated_mlp=true model.hidden_act={act}",
        ),
        (
            bias is not None and bool(bias.any()),
            "the logits have a bias",
            "train with model.output_bias=false",
        ),
        (
            config.final_logit_softcapping is not None,
            f"the logits are bounded by {config.final_logit_softcapping}",
            "train with model.final_logit_softcapping=null",
        ),
        (
            config.position_type != "rotary",
            f"positions are {config.position_type}, not rotary",
            "train with model.position_type=rotary",
        ),
        (
            rope != "default" and not layout.has_rope_scaling,
            f"rotary positions are scaled by {rope}",
            "train with the default rope_type",
        ),
    )
    return [f"{reason} ({remedy})" for applies, reason, remedy in rules if applies]


def convert(model: GenLMForCausalLM, layout: Layout) -> PreTrainedModel:
    """Convert to transformers' own class, on the CPU in float32; `find_misfits` must find nothing."""
    weights = fold(model, layout)
    is_tied = torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    converted = layout.model_class(_convert_config(model.config, layout, is_tied)).eval()
    if is_tied:
        del weights["lm_head.weight"]
    missing, unexpected = converted.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if is_tied else set()), missing
    converted.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return converted


def _convert_config(config: GenLMConfig, layout: Layout, is_tied: bool) -> PreTrainedConfig:
    """The config of `layout` for the folded weights."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "attention_dropout", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    windows = {}
    if layout.has_window:
        mixers = config.mixer_types or []
        is_sliding = "sliding_attention" in mixers
        windows = {
            "use_sliding_window": is_sliding,
            "sliding_window": config.sliding_window if is_sliding else None,
            "layer_types": list(mixers),
        }
    return layout.config_class(
        **{name: getattr(config, name) for name in same},
        **windows,
        hidden_act=config.hidden_act if config.gated_mlp else "relu",
        tie_word_embeddings=is_tied,
        dtype="float32",
    )


@torch.no_grad()
def fold(model: GenLMForCausalLM, layout: Layout) -> dict[str, torch.Tensor]:
    """Weights in float32 by the names of `layout`; products are computed in float64."""
    decoder, config = model.model, model.config
    table, head = decoder.embed_tokens.weight.double(), model.lm_head.weight.double()
    if decoder.embed_proj is not None:
        projection = decoder.embed_proj
        if decoder.reads_out:  # the head is E after W: (h W^T) E^T = h (E W)^T
            head = head @ projection.weight.double().t()
        table = table @ projection.weight.double().t() + projection.bias.double()
    weights = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": head,
    }
    for number in range(len(config.layer_types)):
        layer = decoder.layers[number % len(decoder.layers)]
        up = _full_matrix(layer.mlp.up_proj)
        parts = {
            "input_layernorm": layer.mixer_norm.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
            "self_attn.q_proj": layer.mixer.q_proj.weight,
            "self_attn.k_proj": layer.mixer.k_proj.weight,
            "self_attn.v_proj": layer.mixer.v_proj.weight,
            "self_attn.o_proj": layer.mixer.out_proj.weight,
            "mlp.gate_proj": _full_matrix(layer.mlp.gate_proj) if config.gated_mlp else up,
            "mlp.up_proj": up,
            "mlp.down_proj": _full_matrix(layer.mlp.down_proj),
        }
        if layout.has_qk_norm:  # ours is without weights
            assert config.head_dim is not None
            parts |= {f"self_attn.{name}_norm": torch.ones(config.head_dim) for name in "qk"}
        weights |= {f"model.layers.{number}.{name}.weight": weight for name, weight in parts.items()}
    return {name: weight.detach().cpu().float().clone() for name, weight in weights.items()}


def _full_matrix(linear: nn.Linear | GenLMLowRankLinear) -> torch.Tensor:
    """The matrix (out, in) of a layer, of a low-rank one as the product of its two factors."""
    if isinstance(linear, GenLMLowRankLinear):
        return linear.expand_proj.weight.double() @ linear.reduce_proj.weight.double()
    return linear.weight
