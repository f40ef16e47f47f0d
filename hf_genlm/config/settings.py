"""Settings of a run: a recipe in which everything is decided, and the facts that decide it.

A settled section has the fields of its recipe section; those that a recipe may leave open are narrowed to a
type without None. A docstring names the fields in which None is still a value.
"""

from dataclasses import dataclass

from pydantic import ConfigDict

from hf_genlm.config.recipe import (
    CardRecipe,
    CorpusRecipe,
    EvaluationRecipe,
    ModelRecipe,
    PrivacyRecipe,
    Recipe,
    TokenizerRecipe,
    TrainingRecipe,
    VectorsRecipe,
)
from hf_genlm.model import GenLMConfig, mixers_of

_FROZEN = ConfigDict(frozen=True)


@dataclass(frozen=True)
class Shape:
    """Width and depth of a decoder, and the rows that train it well."""

    hidden_size: int
    num_hidden_layers: int
    max_seq_length: int
    batch_size: int


@dataclass(frozen=True)
class Pace:
    """Conversion of optimizer steps to tokens and epochs, whose last step has the rows that are left."""

    n_rows: int | None  # of one epoch; None: unknown
    rows_per_step: int
    targets_per_row: int
    n_targets: int | None = None  # tokens predicted in one epoch; None: all rows are full

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; 1 for an unknown text, of which every step counts as an epoch."""
        return 1 if self.n_rows is None else -(-self.n_rows // self.rows_per_step)

    @property
    def _targets(self) -> tuple[int, int]:
        """Tokens predicted in a full step and in an epoch."""
        n_rows = self.rows_per_step if self.n_rows is None else self.n_rows
        return self.rows_per_step * self.targets_per_row, self.n_targets or n_rows * self.targets_per_row

    def epochs(self, step: int) -> float | None:
        """Epochs after `step` steps; None: unknown."""
        return None if self.n_rows is None else round(step / self.steps_per_epoch, 3)

    def tokens(self, step: int) -> int:
        """Predicted tokens after `step` steps, repeats included; within an epoch, rows count as full."""
        (of_step, of_epoch), (epochs, rest) = self._targets, divmod(step, self.steps_per_epoch)
        return epochs * of_epoch + min(rest * of_step, of_epoch)

    def steps(self, tokens: int) -> int:
        """The fewest steps that predict `tokens`."""
        of_step, of_epoch = self._targets
        return tokens // of_epoch * self.steps_per_epoch + -(-(tokens % of_epoch) // of_step)


@dataclass(frozen=True)
class Facts:
    """Facts that were measured or read. The defaults stand for facts that are not known yet."""

    base: GenLMConfig | None = None  # config of the model in `model.init_from`
    base_source: str | None = None  # folder or Hub id of that model
    vector_size: int | None = None  # dimension of the word vectors
    vocab_size: int | None = None
    train_tokens: int | None = None  # None also for a stream, whose length stays unknown
    # tokens that an epoch predicts, the ends of documents included; of each language, where rows are of one
    train_targets: tuple[int, ...] | None = None
    private_documents: int | None = None  # of the training text of a private run
    delta: float | None = None  # of the guarantee of a private run
    shape: Shape | None = None  # planned by the time
    step_s: float | None = None  # of an optimizer step on this machine
    num_threads: int | None = None  # with which a step took so long; None: not on a CPU
    planning_s: float = 0.0  # which counts as training time
    ngram_sizes: tuple[int, ...] | None = None  # n-grams of 1, 2, ... tokens that were counted
    leave_one_out: bool = False  # most of the text was counted: a word of it finds its own count
    is_sharded: bool = False  # each process will hold a part of the weights

    def epoch_tokens(self, max_seq_length: int) -> int | None:
        """Tokens of one pass over the text. Each document of a private run counts as one full row, as one
        long document would decide otherwise."""
        if self.private_documents is not None:
            return self.private_documents * max_seq_length
        return self.train_tokens

    def pace(self, max_seq_length: int, rows_per_step: int, carries_state: bool) -> Pace:
        """Tokens by step. A private run draws as many documents for every step."""
        width = max_seq_length - 1
        if self.train_targets is None or self.private_documents is not None:
            return Pace(None, rows_per_step, width)
        n_rows = sum(-(-n_targets // width) for n_targets in self.train_targets)
        if carries_state:  # every step is full: the rows that are left wait for another epoch
            return Pace(max(1, n_rows // rows_per_step) * rows_per_step, rows_per_step, width)
        return Pace(n_rows, rows_per_step, width, sum(self.train_targets))


class CorpusSettings(CorpusRecipe):
    model_config = _FROZEN


class TokenizerSettings(TokenizerRecipe):
    model_config = _FROZEN
    vocab_size: int


class ModelSettings(ModelRecipe):
    """Remaining None: no `init_from`; no `size`, as the shape was planned or stated; full `mlp_rank`; an
    embedding as wide as the layers; no sliding window; unbounded logits."""

    model_config = _FROZEN
    mixers: list[str]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    bigram_size: int
    ngram_history: int
    tie_word_embeddings: bool
    output_bias: bool


class VectorsSettings(VectorsRecipe):
    model_config = _FROZEN


class TrainingSettings(TrainingRecipe):
    """Remaining None: those of `minutes`, `steps` and `tokens` that do not end the run; torch's own number
    of threads; no compiler; checkpoints by `save_minutes`."""

    model_config = _FROZEN
    max_seq_length: int
    batch_size: int
    init: str
    learning_rate: float
    embedding_lr_ratio: float
    weight_decay: float
    warmup_steps: int
    num_validations: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts."""
        return self.rows_per_step * (self.max_seq_length - 1)


class EvaluationSettings(EvaluationRecipe):
    model_config = _FROZEN
    context_length: int
    stride: int
    carry_state: bool


class PrivacySettings(PrivacyRecipe):
    """Remaining None: no `epsilon`, and then no `delta`."""

    model_config = _FROZEN


class CardSettings(CardRecipe):
    model_config = _FROZEN


@dataclass(frozen=True)
class Length:
    """The end of a run, and how far it is expected to come."""

    max_steps: int
    seconds: float | None  # None: no time limit
    expected_steps: int
    epochs: float | None  # that are expected; None: the length of the text is not known
    step_s: float | None  # that a step is expected to take; None: not measured
    pace: Pace
    num_threads: int | None  # with which it was measured; None: not measured, or not on a CPU


@dataclass(frozen=True)
class Settings:
    """A recipe in which everything is decided."""

    corpus: CorpusSettings
    tokenizer: TokenizerSettings
    model: ModelSettings
    vectors: VectorsSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    privacy: PrivacySettings
    card: CardSettings
    length: Length
    architecture: GenLMConfig  # of the model, but for its special tokens; copy it before use

    def to_recipe(self) -> Recipe:
        """The recipe that repeats this run."""
        recipe = Recipe()
        for name in Recipe.model_fields:
            for key, value in getattr(self, name).model_dump().items():
                setattr(getattr(recipe, name), key, value)
        of_decoder = mixers_of(self.model.decoder, self.model.num_hidden_layers)
        if self.model.init_from is None and self.model.mixers == of_decoder:
            recipe.model.mixers = None  # so that another decoder can be stated
        return recipe
