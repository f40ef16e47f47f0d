"""Schemas of the files of a run folder, one dataclass each; `files.read` and `files.write_json` check them.

Counts are bounded by 64 bits and numbers are finite, so that no damaged file overflows a computation.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue, create_model

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False, gt=-1e150, lt=1e150)]
Time = Annotated[float, Field(ge=0, lt=250_000_000_000)]  # seconds since 1970, up to the year 9,892


@dataclass(frozen=True)
class SplitCounts:
    """Counts of one split; None where a stream was read and not counted. A language has no `sha256`, that of
    all texts."""

    documents: Count | None
    bytes: Count | None
    sha256: str | None = None
    characters: Count | None = None
    tokens: Count | None = None
    words: Count | None = None


@dataclass(frozen=True)
class SourceFile:
    """One file that was read, or a Hub data set, whose bytes on disk are None."""

    name: str
    bytes: Count | None
    sha256: str | None
    documents: Count | None
    samples_sha256: str | None = None
    modified: Count | None = None


@dataclass(frozen=True)
class SplitMethod:
    """Method by which the validation split was held out."""

    method: str
    seed: int
    fraction: Number


@dataclass(frozen=True)
class NearDuplicateCounts:
    """Documents that were removed as near-duplicates."""

    removed: Count
    clusters: Count
    threshold: Number
    shingle: Count


@dataclass(frozen=True)
class DamageCounts:
    """Damaged records and files that were left out."""

    records: Count
    files: Count


@dataclass(frozen=True)
class ScrubbedCounts:
    """Replacements of personal data by type; None where a stream was not counted."""

    types: dict[str, Count | None]
    documents: Count | None


@dataclass(frozen=True)
class LanguageSplitCounts:
    """Counts of one language in one split, which has no hash of its own."""

    documents: Count
    bytes: Count
    characters: Count | None = None
    tokens: Count | None = None


@dataclass(frozen=True)
class LanguageCounts:
    """Text of one language, and how often training reads it in an epoch."""

    train: LanguageSplitCounts
    validation: LanguageSplitCounts
    repeats: Number
    share: Number | None = None
    byte_premium: Number | None = None


@dataclass(frozen=True)
class PlantedCounts:
    """Canaries in the training text."""

    candidates: Count
    planted: Count
    documents: Count
    planted_by_repetitions: dict[str, Count]


@dataclass(frozen=True)
class CorpusFile:
    """corpus.json: what was read, split and left out."""

    description: str
    files: list[SourceFile]
    split: SplitMethod
    train: SplitCounts
    validation: SplitCounts
    sources: list[str] = field(default_factory=list)
    python: str | None = None
    encoding: str | None = None
    duplicates_removed: Count | None = None
    duplicate_texts: Count | None = None
    copies_removed: Count | None = None  # before texts were cut
    held_out_in_training: Number | None = None  # share of its runs of 64 letters; None: not measured
    empty_skipped: Count | None = None
    files_skipped: Count | None = None
    notices: list[str] = field(default_factory=list)
    stream: dict[str, JsonValue] | None = None
    near_duplicates: NearDuplicateCounts | None = None
    damaged: DamageCounts | None = None
    scrubbed: ScrubbedCounts | None = None
    languages: dict[str, LanguageCounts] = field(default_factory=dict)
    canaries: PlantedCounts | None = None
    chats: Count | None = None


@dataclass(frozen=True)
class EnvironmentFile:
    """environment.json: versions and machine."""

    python: str
    platform: str
    cpu_count: Count | None
    packages: dict[str, str | None]
    device: str | None = None
    processes: Count = 1


@dataclass(frozen=True)
class VectorWords:
    """Words of a file of vectors: all, and those left out by reason."""

    read: Count
    skipped: dict[str, Count]


@dataclass(frozen=True)
class VectorsFile:
    """vectors.json: the word vectors that the embedding began with."""

    file: str
    sha256: str
    dimension: Count
    words: VectorWords
    tokens: dict[str, Count]
    share_of_text: dict[str, Number]
    frozen: bool
    unfreeze_step: Count | None = None


@dataclass(frozen=True)
class GuaranteeFile:
    """privacy.json: the guarantee of differentially private training."""

    epsilon: Number
    delta: Number
    unit: str
    sampling_rate: Number | None = None
    noise_multiplier: Number | None = None
    clip_norm: Number | None = None
    steps: Count | None = None
    accountant: str | None = None
    covered: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MeasurementRecord:
    """A measurement in JSON, which has no infinity and no NaN: such a number is None."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    name: str
    value: Finite | None
    unit: str
    n: Count
    stderr: Finite | None
    split: str
    higher_is_better: bool
    interval: tuple[Finite, Finite] | None = None


@dataclass(frozen=True)
class MeasurementsFile:
    """evaluation.json, languages.json and audit.json, as far as they hold measurements."""

    measurements: list[MeasurementRecord]


@dataclass(frozen=True)
class ModelConfigFile:
    """model/config.json: the fields that the card shows."""

    mixer_types: Annotated[list[str], Field(min_length=1)]
    hidden_size: Count
    vocab_size: Count
    max_position_embeddings: Count
    shared_layers: Count = 1
    ngram_order: Count | None = None
    ngram_history: Count | None = None
    ngram_sizes: list[Count] | None = None


@dataclass(frozen=True)
class AnyModelConfigFile:
    """config.json of any model."""

    model_type: str | None = None
    mixer_types: list[str] | None = None
    vocab_size: Count | None = None


_Ids = Annotated[int, Field(ge=-(2**63), lt=2**63)] | list[int] | None  # of tokens


@dataclass(frozen=True)
class GenerationConfigFile:
    """generation_config.json of any model: the fields whose types transformers does not check."""

    bos_token_id: _Ids = None
    eos_token_id: _Ids = None
    pad_token_id: _Ids = None
    max_length: Count | None = None
    max_new_tokens: Count | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    top_k: Count | None = None
    num_beams: Count | None = None
    num_return_sequences: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    repetition_penalty: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    epsilon_cutoff: Number | None = None
    eta_cutoff: Number | None = None
    length_penalty: Number | None = None
    no_repeat_ngram_size: Count | None = None
    do_sample: bool | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_logits: bool | None = None
    output_scores: bool | None = None
    return_dict_in_generate: bool | None = None


@dataclass(frozen=True)
class TokenizerConfigFile:
    """tokenizer_config.json of any model: the fields whose types transformers does not check."""

    model_max_length: Number | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    model_input_names: list[str] | None = None


TokenId = Annotated[int, Field(ge=0, lt=2**24)]  # the library allocates memory for as many tokens


@dataclass(frozen=True)
class _AddedToken:
    id: TokenId


@dataclass(frozen=True)
class _Vocabulary:
    vocab: dict[str, TokenId] | list[JsonValue] | None = None


@dataclass(frozen=True)
class TokenizerFile:
    """tokenizer.json of any tokenizer: the ids of its tokens."""

    model: _Vocabulary | None = None
    added_tokens: list[_AddedToken] | None = None


@dataclass(frozen=True)
class PreparedCandidate:
    """Settings and size of a candidate of a comparison; `text` is the folder of its corpus.json."""

    text: str
    fields: dict[str, JsonValue]
    parameters: Count
    training_flops_per_token: Number
    hidden_size: Count
    layers: Count


PreparedFile = dict[str, PreparedCandidate]  # prepared.json of a comparison, by candidate
FinishedFile = dict[str, dict[str, str]]  # finished.json of a comparison: run -> file -> SHA-256


@dataclass(frozen=True)
class Event:
    """A line of log.jsonl that no verb reads further."""

    event: str
    time: Time | None = None


_Optional: Any = (Number | None, None)  # the type and the default of a field that may be missing
_AT_STEP = {"step": Count, "elapsed_s": _Optional}
_VALUE = create_model("value", name=str, value=Number | None)
# event of log.jsonl -> its fields, as far as they are read
_FIELDS: dict[str, dict[str, Any]] = {
    "step": {
        "step": Count, "tokens": Count, "elapsed_s": Number, "loss": Number | None,
        "learning_rate": _Optional, "grad_norm": _Optional, "tokens_per_s": _Optional,
    },
    "validation": {
        **_AT_STEP, "seen_tokens": (Count | None, None), "nats_per_token": _Optional,
        "bits_per_byte": _Optional,
    },
    "sample": {"step": Count, "text": str, "elapsed_s": Number},
    "started": {"base_model": (str | None, None)},
    "model": {"parameters": Count, "of_counts": (Count | None, None)},
    "resumed": _AT_STEP,
    "stopped": _AT_STEP,
    "diverged": {"step": Count, "back_to": Count},
    "trained": {
        "steps": Count, "tokens": Count, "seconds": Number, "tokens_per_s": Number, "epochs": _Optional,
    },
    "counts": {"order": Count, "bits_per_byte": Number},
    "forecast": {"expected": _Optional, "times": _Optional, "bits_per_byte": Number},
    "evaluated": {"measurements": list[_VALUE]},  # type: ignore[valid-type]
}  # fmt: skip
EVENTS = {event: create_model(event, **fields) for event, fields in _FIELDS.items()}
