"""The sections of a recipe: every field that decides a run, with its type and default.

What a number may be is in ranges.py; recipe.py reads and checks them.
"""

from dataclasses import dataclass, field


@dataclass
class CorpusRecipe:
    """What is read, and how it is split into training and validation."""

    sources: list[str] = field(
        default_factory=list
    )  # files, folders, globs, Hub ids; none: the embedded default
    languages: dict[str, list[str]] = field(default_factory=dict)  # instead: sources by language code
    validation: list[str] = field(default_factory=list)  # sources held out as they are; none: split `sources`
    validation_fraction: float = 0.05  # of the bytes, when `sources` are split
    split_seed: int = 0  # apart from training.seed: runs with other seeds share one split
    split_by_hash: bool = False  # each document by its own hash alone, as privacy.epsilon has it in any case
    encoding: str = "utf-8"
    temperature: float = 1.0  # T: languages are read by size^(1/T); 1: as they are, large: all alike
    byte_premiums: dict[str, float] = field(
        default_factory=dict
    )  # bytes that a language needs for the same content; none: from `parallel`, or 1
    parallel: dict[str, str] = field(
        default_factory=dict
    )  # a file by language, whose lines translate each other
    text_column: str = "text"  # the field of .jsonl, .parquet and Hub records that holds the text
    damaged: str = "stop"  # skip: leave out damaged records, and damaged files inside folders; and count them
    scrub: list[str] = field(
        default_factory=list
    )  # personal data and secrets to replace: email, phone, card, iban, ip, secret, or all; none: nothing
    phone_regions: list[str] = field(
        default_factory=list
    )  # as DE: numbers as they are dialled there are found too; none: only those that begin with +
    near_duplicates: float | None = (
        None  # similarity from which on a training document counts as a copy and is left out; None: none does
    )
    stream: bool = False  # read while training and keep nothing: for text larger than memory and disk
    shuffle_buffer: int = 16_384  # rows of a stream that are shuffled among each other; 0: none
    weights: list[float] | None = None  # share of each source in a stream; None: one after the other
    validation_bytes: int = 2_000_000  # the most that is held out of a stream
    cache: bool = True  # keep the tokenizer and the token ids for the next run over the same text


@dataclass
class TokenizerRecipe:
    """The byte-level BPE vocabulary."""

    path: str | None = None  # a tokenizer folder to use instead of training one
    vocab_size: int | None = None  # None: chosen from the size of the corpus
    pattern: str = "own"  # where words end; gpt2, qwen35: as in models of that name, for llama.cpp
    max_characters: int = 50_000_000  # text sampled for training the merges: bounds the memory


@dataclass
class ModelRecipe:
    """The decoder and its shape. `null` fields follow from `size`, or are those of `init_from`."""

    init_from: str | None = None  # a run or model folder whose weights, shape and tokenizer to go on with
    decoder: str = "gated_linear"
    mixers: list[str] | None = None  # one word per layer; overrides `decoder`
    size: str | None = None  # tiny, small, base, or a parameter count such as 30M; None: by the time
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    qk_norm: bool = True  # queries and keys of attention are normalised
    intermediate_size: int | None = None
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)), as Llama's, in place of down(act(up(x)))
    hidden_act: str = "relu2"  # act, by transformers' name; relu2: the squared ReLU
    mlp_rank: int | None = None  # of the matrices of the MLP; None: full
    shared_layers: int = 1  # layers that share each set of weights
    embedding_size: int | None = None  # width of the embedding table; None: `hidden_size`
    bigram_size: int | None = None  # rows of a table of token pairs, hashed; 0: no table; None: by decoder
    position_type: str = "rotary"
    sliding_window: int | None = None
    tie_word_embeddings: bool | None = None  # the head is the embedding; None: where that was made narrow
    output_bias: bool | None = None  # None: follows from `training.init`
    final_logit_softcapping: float | None = None  # bound of the logits; None: unbounded
    dropout: float = 0.0


@dataclass
class VectorsRecipe:
    """Word vectors that the embedding starts from; they set `model.embedding_size`."""

    path: str | None = None  # GloVe, word2vec or fastText, as text or binary, gzipped or not
    damaged: str = "stop"  # skip: leave out bad lines and words, and count them
    frozen: bool = False  # tokens that have a vector keep it; drawn ones and the projection learn
    unfreeze_step: int | None = None  # with `frozen`: the optimizer step after which all learn


@dataclass
class TrainingRecipe:
    """The optimisation. Exactly one of `minutes`, `steps`, `tokens` ends it."""

    minutes: float | None = None  # wall-clock of the training phase: steps and what runs between them
    steps: int | None = None  # optimizer steps
    tokens: int | None = None  # training tokens seen, repeats counted
    max_epochs: float = 8.0  # over the text, of a run by the clock: beyond, it is learned by heart
    seed: int = 0
    max_seq_length: int | None = None  # tokens in one packed row; None: follows from `size`
    batch_size: int | None = None  # rows in one forward pass, over all processes; None: follows from `size`
    gradient_accumulation_steps: int = 1  # forward passes in one optimizer step
    carry_state: bool = False  # rows in order; recurrent layers go on from where the row before ended
    init: str | None = None  # bigrams: from the bigram counts of the text; random; None: bigrams, unless tied
    optimizer: str = "adamw"  # or muon, sgd
    learning_rate: float | None = None  # peak; None: follows from the width
    embedding_lr_ratio: float | None = (
        None  # of embedding and head, in parts of `learning_rate`; None: by `init`
    )
    matrix_lr_ratio: float = (
        5.5  # under muon: learning rate of the layers' matrices, in parts of `learning_rate`
    )
    weight_decay: float | None = None  # of the layers' matrices; None: by the passes over the text
    embedding_decay_ratio: float = 1.0  # of embedding and head, in parts of `weight_decay`
    bigram_decay_ratio: float = 3.0  # of the table of pairs, in parts of `weight_decay`
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0  # share of the target that is spread over the vocabulary
    z_loss: float = 0.0  # weight of the squared log of the normaliser
    warmup_ratio: float = 0.02  # of the run
    decay_ratio: float = 0.5  # of the run, linear to zero at its end
    num_threads: int | None = (
        None  # of torch in each process on a CPU; None: measured before a run by the clock, else torch's own
    )
    torch_compile_backend: str | None = (
        None  # backend of torch.compile for the steps, as inductor; None: no compiler
    )
    dtype: str = "auto"  # auto: bfloat16 autocast where the device computes it natively, else float32
    num_validations: int | None = None  # on a part of the validation split; None: 4 in half a minute or more
    num_samples: int = 2  # texts written at each of them, and at the end
    save_minutes: float = 1.0  # of training between two checkpoints, a saving's time 50 times at least
    save_steps: int | None = None  # optimizer steps between two checkpoints instead; 0: none are written
    save_total_limit: int = 2  # until the run is done
    milestone_words: list[str] = field(
        default_factory=list
    )  # after so many words of text (500K, 1M) the model is kept in milestones/; babylm: 1M, 2M ... 1000M
    report_to: list[str] = field(default_factory=list)  # tensorboard, trackio: hear what log.jsonl does


@dataclass
class EvaluationRecipe:
    """The exact pass at the end."""

    context_length: int | None = None  # tokens a prediction may look back on; None: the row length
    stride: int | None = (
        None  # tokens by which the context slides over a long document; None: half the context
    )
    batch_size: int = 32  # windows in one forward pass; no figure depends on it
    carry_state: bool | None = None  # look back to the document's start, by states; None: as in training


@dataclass
class PrivacyRecipe:
    """A guarantee for each document of the training text, and what an audit asks for afterwards."""

    canaries: list[int] = field(
        default_factory=list
    )  # how often random secrets are planted in the training text, as 1, 4, 16, 32; none: no canaries
    canaries_each: int = 8  # candidates for each of these counts, of which a coin leaves out about half
    canaries_seed: int = 0  # of the secrets, the coins and the places
    epsilon: float | None = None  # the most that a run spends; None: no guarantee
    delta: float | None = None  # chance that the guarantee fails; None: n^-1.1 of n documents
    clip_norm: float = 1.0  # at most this long is the gradient of a document
    secure_noise: bool = False  # of a cryptographic generator, and safe against attacks on its last bits


@dataclass
class CardRecipe:
    """What no measurement can know about the model; `hf-genlm card RUN --set card.x=...` says it later."""

    name: str | None = None  # None: that of the run folder
    license: str | None = None  # an identifier of the Hub, as mit; other: with the next two
    license_name: str | None = None
    license_link: str | None = None  # an address, or LICENSE, a file beside the weights
    language: list[str] = field(default_factory=list)  # ISO 639 codes; none: those of `corpus.languages`
    authors: list[str] = field(default_factory=list)
    url: str | None = None  # where the model is described
    citation: str | None = None  # BibTeX; None: made of the fields above
    intended_use: str | None = None
    datasets: list[str] = field(default_factory=list)  # Hub ids, besides sources that are such
    base_model: str | None = None  # Hub id; None: of the model in `model.init_from`, where it has one
    tags: list[str] = field(default_factory=list)  # besides those of the decoder
