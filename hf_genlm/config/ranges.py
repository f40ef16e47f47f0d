"""What the numbers of a recipe may be."""

import math
from typing import NamedTuple

MOST_WHOLE = 2**53  # beyond, a float does not hold every whole number


class Range(NamedTuple):
    """From `least` to `most`; an open end is no part of it."""

    least: float
    most: float = math.inf
    is_open_below: bool = False
    is_open_above: bool = False

    def holds(self, value: float) -> bool:
        """True if `value` lies in it; not a number does not."""
        above = self.least < value if self.is_open_below else self.least <= value
        below = value < self.most if self.is_open_above else value <= self.most
        return above and below

    def __str__(self) -> str:
        if self.most == math.inf:
            if self.is_open_below:
                return f"more than {self.least:,}"
            return f"at least {self.least:,}"
        if self.is_open_below and self.is_open_above:
            return f"between {self.least:,} and {self.most:,}"
        above = "more than " if self.is_open_below else ""
        below = "less than " if self.is_open_above else ""
        return f"from {above}{self.least:,} to {below}{self.most:,}"


_SIZE = Range(1, 2**20)
_COUNT = Range(1)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, is_open_below=True)
_SHARE = Range(0, 1)
_PART = Range(0, 1, is_open_above=True)

# every number of a recipe has its row
RANGES = {
    "corpus.validation_fraction": Range(0, 1, is_open_below=True, is_open_above=True),
    "corpus.temperature": Range(1),
    "corpus.byte_premiums": _POSITIVE,
    "corpus.split_seed": Range(-MOST_WHOLE),
    "corpus.near_duplicates": Range(0, 1, is_open_below=True),
    "corpus.shuffle_buffer": _NOT_NEGATIVE,
    "corpus.validation_bytes": _COUNT,
    "tokenizer.vocab_size": Range(258),  # 256 bytes and two special tokens
    "tokenizer.max_characters": _COUNT,
    "model.hidden_size": _SIZE,
    "model.num_hidden_layers": Range(1, 1000),
    "model.num_attention_heads": _SIZE,
    "model.num_key_value_heads": _SIZE,
    "model.intermediate_size": _SIZE,
    "model.mlp_rank": _SIZE,
    "model.shared_layers": _SIZE,
    "model.embedding_size": _SIZE,
    "model.bigram_size": Range(0, 2**30),
    "model.sliding_window": Range(2, 2**30),
    "model.final_logit_softcapping": _POSITIVE,
    "model.dropout": _PART,
    "vectors.unfreeze_step": _COUNT,
    "training.minutes": Range(0, 10**7, is_open_below=True),
    "training.steps": _COUNT,
    "training.tokens": _COUNT,
    "training.max_epochs": _POSITIVE,
    "training.seed": Range(0, 2**32 - 1),  # numpy's
    "training.max_seq_length": Range(2, 2**20),
    "training.batch_size": _SIZE,
    "training.gradient_accumulation_steps": _SIZE,
    "training.learning_rate": _POSITIVE,
    "training.embedding_lr_ratio": _NOT_NEGATIVE,
    "training.matrix_lr_ratio": _NOT_NEGATIVE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.embedding_decay_ratio": _NOT_NEGATIVE,
    "training.bigram_decay_ratio": _NOT_NEGATIVE,
    "training.adam_beta1": _PART,
    "training.adam_beta2": _PART,
    "training.max_grad_norm": _NOT_NEGATIVE,
    "training.label_smoothing_factor": _PART,
    "training.z_loss": _NOT_NEGATIVE,
    "training.warmup_ratio": _SHARE,
    "training.decay_ratio": _SHARE,
    "training.num_threads": Range(1, 2**16),
    "training.num_validations": Range(0, 10**6),
    "training.num_samples": Range(0, 10**4),
    "training.save_minutes": _NOT_NEGATIVE,
    "training.save_steps": _NOT_NEGATIVE,
    "training.save_total_limit": _COUNT,
    "evaluation.context_length": Range(2, 2**30),
    "evaluation.stride": Range(1, 2**30),
    "evaluation.batch_size": _SIZE,
    "privacy.canaries": Range(1, 10**6),
    "privacy.canaries_each": Range(1, 10**4),
    "privacy.canaries_seed": Range(0, MOST_WHOLE),
    "privacy.epsilon": Range(0, 1000, is_open_below=True),
    "privacy.delta": Range(0, 1, is_open_below=True, is_open_above=True),
    "privacy.clip_norm": _POSITIVE,
}
