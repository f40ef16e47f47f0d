"""Every field of a recipe, declared once: type, default, allowed values, help and synonyms.

None as a default: the field is open, and settle.py decides it, or something is off, as its help says.
"""

from typing import ClassVar

from hf_genlm.config.fields import (
    MAX_WHOLE,
    Flag,
    Number,
    NumberByKey,
    Numbers,
    Section,
    Whole,
    Wholes,
    Word,
    WordByKey,
    Words,
    WordsByKey,
    setting,
)

MAX_SIZE = 2**20  # of a width, a batch or a row
# fmt: off
# below: a table, a field in one to three lines
# tests/config/test_recipe.py compares these words with the tables that act on them
DAMAGED = ("stop", "skip")
DOCUMENTS = ("files", "whole", "lines")
DECODERS = ("elman", "gru", "lstm", "gated_linear", "transformer", "sliding", "hybrid", "ngram")
MIXERS = ("elman", "gru", "lstm", "gated_linear", "full_attention", "sliding_attention", "ngram")
OPTIMIZERS = ("adamw", "muon", "sgd")
PATTERNS = ("own", "gpt2", "qwen35")
PERSONAL = ("secret", "email", "iban", "card", "ip", "phone", "all")
POSITIONS = ("rotary", "learned", "none")
TRACKERS = ("tensorboard", "trackio")


class CorpusRecipe(Section):
    """The text that is read, and its split into training and validation."""

    section: ClassVar[str] = "corpus"
    sources: Words = setting([], "Files, folders, globs and Hub ids. Empty: Python's library source.",
        synonyms="data dataset text train_file")
    languages: WordsByKey = setting({}, "Sources by language code, in place of `sources`.")
    validation: Words = setting([], "Sources held out as they are. Empty: a part of `sources`.",
        synonyms="valid dev held_out eval validation_file")
    validation_fraction: Number = setting(0.05, "Share of the bytes that is held out of `sources`.",
        more_than=0, less_than=1, synonyms="val_fraction validation_split test_size")
    split_seed: Whole = setting(0,
        "Seed of the split, apart from `training.seed`: runs with other seeds share one split.")
    split_by_hash: Flag = setting(False,
        "Hold out each document by its own hash alone; always so with `privacy.epsilon`.")
    encoding: Word = setting("utf-8", "Encoding of text files that are not UTF-8.", synonyms="charset")
    temperature: Number = setting(1.0,
        "T of sampling languages by size^(1/T). 1: as they are; large: all equally often.", at_least=1,
        synonyms="sampling_temperature alpha")
    byte_premiums: NumberByKey = setting({},
        "Bytes that each language needs for the same content. Empty: from `parallel`, or 1.", more_than=0)
    parallel: WordByKey = setting({}, "A file per language whose lines translate each other.",
        synonyms="translations")
    text_column: Word = setting("text", "Field of records, columns and Hub data sets that holds the text.",
        synonyms="column text_field")
    documents: Word = setting("files",
        "Documents of plain text files: files, cut at lines such as <|endoftext|>; whole files; or lines, as "
        "of names.",
        choices=DOCUMENTS, synonyms="line_by_line sample_by")
    unpack_memory_mb: Whole = setting(256,
        "Memory for the window of a .zst or .xz file; 2048 reads those of `zstd --long=31`.",
        at_least=1, at_most=4096, synonyms="long max_window")
    damaged: Word = setting("stop",
        "skip: leave damaged records, and damaged files inside folders, out and count them.", choices=DAMAGED,
        synonyms="on_error errors")
    keep_held_out: Flag = setting(False,
        "Train on documents whose text is held out too, as short messages that occur often.")
    scrub: Words = setting([], "Kinds of personal data and secrets that placeholders replace. Empty: none.",
        choices=PERSONAL, synonyms="pii anonymize redact")
    phone_regions: Words = setting([],
        "Regions, such as DE, whose national phone numbers are found too. Empty: only numbers with +.")
    near_duplicates: Number | None = setting(None,
        "Leave out training documents at least this similar to another one. null: keep all.", more_than=0,
        at_most=1, synonyms="dedup deduplicate minhash")
    stream: Flag = setting(False,
        "Read while training and store nothing: for text larger than memory and disk.", synonyms="streaming")
    shuffle_buffer: Whole = setting(16_384, "Rows of a stream that are shuffled among each other. 0: none.",
        at_least=0, synonyms="buffer_size")
    weights: Numbers | None = setting(None,
        "Share of each source in a stream. null: one source after the other.", more_than=0,
        synonyms="mixture probabilities")
    validation_bytes: Whole = setting(2_000_000, "Bytes that are held out of a stream, at most.", at_least=1)
    cache: Flag = setting(True, "Store the tokenizer and the token ids for the next run over the same text.")


class TokenizerRecipe(Section):
    """The byte-level BPE vocabulary."""

    section: ClassVar[str] = "tokenizer"
    path: Word | None = setting(None, "A tokenizer folder to use. null: train one.",
        synonyms="tokenizer_name")
    vocab_size: Whole | None = setting(None,
        "Tokens in the vocabulary: 256 bytes, two special tokens, and merges. null: by the size of the text.",
        at_least=258, at_most=2**24, synonyms="vocabulary vocab merges")
    pattern: Word = setting("own",
        "Rule for where words end. gpt2 and qwen35 are those of these models, for llama.cpp.",
        choices=PATTERNS, synonyms="pre_tokenizer regex")
    max_characters: Whole = setting(50_000_000,
        "Characters that the merges are learned from; bounds the memory.", at_least=1)


class ModelRecipe(Section):
    """The decoder and its shape. Open sizes follow from `size` or the time, or are those of `init_from`."""

    section: ClassVar[str] = "model"
    init_from: Word | None = setting(None,
        "A run or model folder whose weights, shape and tokenizer to continue with. null: start anew.",
        synonyms="from model_name pretrained checkpoint")
    decoder: Word = setting("gated_linear", "Preset of mixers for all layers.", choices=DECODERS,
        synonyms="architecture arch model_type")
    mixers: Words | None = setting(None, "One mixer per layer, in place of `decoder`.", choices=MIXERS,
        synonyms="mixer_types layer_types")
    size: Word | None = setting(None,
        "tiny, small, base, or a parameter count such as 30M. null: by the time, else tiny.",
        synonyms="model_size num_parameters")
    hidden_size: Whole | None = setting(None, "Width of the layers.", at_least=1, at_most=MAX_SIZE,
        synonyms="width d_model n_embd dim hidden")
    num_hidden_layers: Whole | None = setting(None, "Number of layers.", at_least=1, at_most=1000,
        synonyms="layers depth n_layer n_layers num_layers")
    num_attention_heads: Whole | None = setting(None, "Heads of attention layers. null: one per 64 of width.",
        at_least=1, at_most=MAX_SIZE, synonyms="heads n_head n_heads num_heads")
    num_key_value_heads: Whole | None = setting(None,
        "Heads of keys and values (grouped-query attention). null: as many as attention heads.", at_least=1,
        at_most=MAX_SIZE, synonyms="kv_heads n_kv_heads gqa")
    qk_norm: Flag = setting(True, "Normalise queries and keys of attention.")
    intermediate_size: Whole | None = setting(None,
        "Width of the MLP. null: 4 times the width, 8/3 with `gated_mlp`.", at_least=1, at_most=MAX_SIZE,
        synonyms="ffn d_ff mlp_size n_inner ffn_dim")
    gated_mlp: Flag = setting(False, "Llama's MLP, down(act(gate(x)) * up(x)), in place of down(act(up(x))).",
        synonyms="swiglu glu")
    hidden_act: Word = setting("relu2",
        "Activation of the MLP, by transformers' name; relu2 is the squared ReLU.", synonyms="activation act")
    mlp_rank: Whole | None = setting(None, "Rank of the factorised MLP matrices. null: full matrices.",
        at_least=1, at_most=MAX_SIZE, synonyms="low_rank")
    shared_layers: Whole = setting(1, "Layers that share each set of weights.", at_least=1, at_most=MAX_SIZE,
        synonyms="weight_sharing")
    embedding_size: Whole | None = setting(None,
        "Width of the embedding table. null: `hidden_size`, without a projection.", at_least=1,
        at_most=MAX_SIZE, synonyms="embedding_dim embed_dim")
    bigram_size: Whole | None = setting(None,
        "Rows of the hashed table of token pairs. 0: no table. null: by decoder.", at_least=0, at_most=2**30,
        synonyms="bigrams pairs hash_embedding")
    ngram_order: Whole | None = setting(None,
        "Longest n-grams whose counts the model holds, in tokens. 0: none. null: for the decoder ngram by "
        "held-out training text, beside a network 5, and 0 with `embedding_size`, a stream or `epsilon`.",
        at_least=0, at_most=6, synonyms="ngram n_gram kneser_ney order counts")
    ngram_history: Whole | None = setting(None,
        "Last tokens of the text being read that a network with counts searches for what followed the same "
        "words. 0: none. null: 1,024 beside counts.", at_least=0, at_most=2**20,
        synonyms="cache pointer copy repetition")
    ngram_entries: Whole | None = setting(None,
        "N-grams of two tokens and more that the model holds at most, of about 20 bytes each; the rarest are "
        "left out. null: 20,000,000 for the decoder ngram, 4,000,000 beside a network.",
        at_least=1, at_most=2**31 - 1, synonyms="prune pruning")
    position_type: Word = setting("rotary", "Positions of attention layers.", choices=POSITIONS,
        synonyms="positions rope position_embedding")
    sliding_window: Whole | None = setting(None,
        "Tokens that a sliding_attention layer sees, itself included. null: by the decoder.", at_least=2,
        at_most=2**30, synonyms="window window_size attention_window")
    tie_word_embeddings: Flag | None = setting(None,
        "Use the embedding as the head. null: only where `embedding_size` makes it narrow.",
        synonyms="tied tie weight_tying")
    output_bias: Flag | None = setting(None, "Add a bias to the logits. null: with `training.init` bigrams.")
    final_logit_softcapping: Number | None = setting(None, "Bound of the logits. null: unbounded.",
        more_than=0, synonyms="softcap softcapping logit_cap")
    dropout: Number = setting(0.0, "Dropout probability of embedding, mixers and MLPs.", at_least=0,
        less_than=1, synonyms="resid_pdrop hidden_dropout")


    @property
    def is_ngram(self) -> bool:
        """True for a decoder of counts, which no step trains."""
        return (self.mixers or [self.decoder]) == ["ngram"]


class VectorsRecipe(Section):
    """Word vectors that the embedding starts from; they set `model.embedding_size`."""

    section: ClassVar[str] = "vectors"
    path: Word | None = setting(None,
        "GloVe, word2vec or fastText vectors, as text or binary, gzipped or not. null: none.",
        synonyms="word_vectors glove word2vec fasttext")
    damaged: Word = setting("stop", "skip: leave bad lines and words out and count them.", choices=DAMAGED)
    frozen: Flag = setting(False, "Tokens that have a vector keep it; drawn rows and the projection train.",
        synonyms="freeze")
    unfreeze_step: Whole | None = setting(None,
        "With `frozen`: optimizer step after which all rows train. null: never.", at_least=1,
        synonyms="unfreeze")


class TrainingRecipe(Section):
    """The optimisation. Exactly one of `minutes`, `steps` and `tokens` ends it."""

    section: ClassVar[str] = "training"
    minutes: Number | None = setting(None,
        "Wall-clock time of training, planning and validation included; 3 if no end is stated.", more_than=0,
        at_most=10**7, synonyms="time duration hours")
    steps: Whole | None = setting(None, "Optimizer steps, in place of `minutes`.", at_least=1,
        synonyms="max_steps num_steps iterations max_iters")
    tokens: Whole | None = setting(None,
        "Training tokens, repeats counted, in place of `minutes`; with `privacy.epsilon`, a document counts "
        "as a full row.", at_least=1, synonyms="num_tokens max_tokens")
    max_epochs: Number = setting(8.0,
        "Passes over the text after which a run with `minutes` ends early: more would overfit.", more_than=0,
        synonyms="epochs num_train_epochs passes")
    seed: Whole = setting(0, "Seed of weights, dropout and the order of rows.", at_least=0, at_most=2**32 - 1,
        synonyms="random_seed")
    max_seq_length: Whole | None = setting(None, "Tokens in one packed row. null: by size.", at_least=2,
        at_most=MAX_SIZE, synonyms="seq_len sequence_length block_size context max_length")
    batch_size: Whole | None = setting(None, "Rows in one forward pass, over all processes. null: by size.",
        at_least=1, at_most=MAX_SIZE, synonyms="batch bs per_device_train_batch_size train_batch_size")
    gradient_accumulation_steps: Whole = setting(1, "Forward passes in one optimizer step.", at_least=1,
        at_most=MAX_SIZE, synonyms="accumulation grad_accum grad_accumulation")
    carry_state: Flag = setting(False,
        "Read rows in order; recurrent layers continue from the state at the end of the row before.",
        synonyms="stateful tbptt")
    init: Word | None = setting(None,
        "Start of embedding and head: bigram counts of the text, or random. null: bigrams, unless tied.",
        choices=("bigrams", "random"), synonyms="initialization start")
    optimizer: Word = setting("adamw", "Update rule.", choices=OPTIMIZERS, synonyms="optim")
    learning_rate: Number | None = setting(None, "Peak learning rate. null: by the width.", more_than=0,
        synonyms="lr max_lr rate")
    embedding_lr_ratio: Number | None = setting(None,
        "Learning rate of embedding and head, relative to `learning_rate`. null: by `init`.", at_least=0,
        synonyms="embedding_lr")
    matrix_lr_ratio: Number = setting(5.5,
        "With muon: learning rate of the layers' matrices, relative to `learning_rate`.", at_least=0,
        synonyms="muon_lr matrix_lr")
    weight_decay: Number | None = setting(None,
        "Weight decay of the layers' matrices. null: by the epochs over the text.", at_least=0,
        synonyms="decay wd l2")
    embedding_decay_ratio: Number = setting(1.0,
        "Weight decay of embedding and head, relative to `weight_decay`.", at_least=0)
    bigram_decay_ratio: Number = setting(3.0,
        "Weight decay of the table of token pairs, relative to `weight_decay`.", at_least=0)
    adam_beta1: Number = setting(0.9, "Decay of the mean of gradients; the momentum of sgd.", at_least=0,
        less_than=1, synonyms="beta1 momentum")
    adam_beta2: Number = setting(0.99, "Decay of the mean of squared gradients.", at_least=0, less_than=1,
        synonyms="beta2")
    max_grad_norm: Number = setting(1.0, "Gradients are clipped to this norm. 0: not clipped.", at_least=0,
        synonyms="clip clipping grad_clip gradient_clipping")
    label_smoothing_factor: Number = setting(0.0, "Share of the target that is spread over the vocabulary.",
        at_least=0, less_than=1, synonyms="label_smoothing smoothing")
    z_loss: Number = setting(0.0, "Weight of the squared log of the softmax normaliser.", at_least=0)
    network_share: Number = setting(0.25,
        "Beside n-gram counts: share of the network's own loss in the gradients; the rest is that of both.",
        at_least=0, at_most=1)
    warmup_ratio: Number = setting(0.02, "Share of the run in which the learning rate rises.", at_least=0,
        at_most=1, synonyms="warmup")
    warmup_steps: Whole | None = setting(None,
        "Steps in which the learning rate rises at least. null: 10 after a start from bigrams, else 0.",
        at_least=0, at_most=MAX_WHOLE)
    decay_ratio: Number = setting(0.5,
        "Share of the run, at its end, in which the learning rate falls linearly to 0.", at_least=0,
        at_most=1, synonyms="cooldown lr_decay schedule")
    num_threads: Whole | None = setting(None,
        "Threads of torch in each process on a CPU; sums are rounded by it. null: torch's own number, or one "
        "while other programs use the cores, measured before the run and during it.",
        at_least=1, at_most=2**16, synonyms="threads cpus cores")
    torch_compile_backend: Word | None = setting(None,
        "Backend of torch.compile for the steps, such as inductor. null: not compiled.",
        synonyms="compile torch_compile")
    dtype: Word = setting("auto",
        "Precision of the steps. auto: bfloat16 autocast where the device is fast at it (a CPU: with AMX, "
        "from a width of 96 on), else float32.",
        choices=("auto", "bfloat16", "float32"), synonyms="precision bf16 fp16 mixed_precision")
    num_validations: Whole | None = setting(None,
        "Validations on a part of the held-out text along the way. null: 4, or 0 below half a minute.",
        at_least=0, at_most=10**6, synonyms="eval_steps validations evals")
    num_samples: Whole = setting(2, "Texts that are generated at each validation and at the end.", at_least=0,
        at_most=10**4, synonyms="samples")
    save_minutes: Number = setting(1.0,
        "Minutes of training between two checkpoints, and at least 50 times what saving takes.", at_least=0,
        synonyms="checkpoint_minutes")
    save_steps: Whole | None = setting(None,
        "Optimizer steps between two checkpoints. 0: no checkpoints. null: by `save_minutes`.", at_least=0,
        synonyms="checkpoint_steps checkpoints checkpoint_every")
    save_total_limit: Whole = setting(2, "Checkpoints that are kept until the run is done.", at_least=1,
        synonyms="keep max_checkpoints")
    milestone_words: Words = setting([],
        "Word counts (500K, 1M) after which the model is kept in milestones/; babylm: 1M, 2M ... 1000M.",
        synonyms="milestones checkpoint_words")
    logging_steps: Whole | None = setting(None,
        "Optimizer steps between two `step` events; of a long run, the log keeps 2,000. null: two a second.",
        at_least=1, synonyms="log_every log_steps")
    report_to: Words = setting([], "Trackers that receive what log.jsonl receives.", choices=TRACKERS,
        synonyms="tracker wandb logging logger")


class EvaluationRecipe(Section):
    """The exact evaluation at the end."""

    section: ClassVar[str] = "evaluation"
    context_length: Whole | None = setting(None,
        "Tokens that a prediction looks back on. null: `training.max_seq_length`; recurrent: 256 or more.",
        at_least=2, at_most=2**30, synonyms="eval_context context max_length")
    stride: Whole | None = setting(None,
        "Tokens by which the context slides over a long document. null: half of `context_length`.",
        at_least=1, at_most=2**30, synonyms="step sliding_window")
    batch_size: Whole = setting(32, "Windows in one forward pass; changes no result.", at_least=1,
        at_most=MAX_SIZE, synonyms="eval_batch_size per_device_eval_batch_size")
    carry_state: Flag | None = setting(None,
        "Look back to the document's start through recurrent states. null: as in training.")


class PrivacyRecipe(Section):
    """A differential privacy guarantee per training document, and canaries for an audit."""

    section: ClassVar[str] = "privacy"
    canaries: Wholes = setting([],
        "Repetitions, such as 1, 4, 16, of random secrets planted in the training text. Empty: no canaries.",
        at_least=1, at_most=10**6)
    canaries_each: Whole = setting(8,
        "Candidates for each count of repetitions; a coin leaves about half of them out.", at_least=1,
        at_most=10**4)
    canaries_seed: Whole = setting(0, "Seed of secrets, coins and places.", at_least=0, at_most=MAX_WHOLE)
    epsilon: Number | None = setting(None, "Privacy budget of the run. null: no guarantee.", more_than=0,
        at_most=1000, synonyms="dp differential_privacy target_epsilon")
    delta: Number | None = setting(None, "Probability that the guarantee fails. null: n^-1.1 of n documents.",
        more_than=0, less_than=1, synonyms="target_delta")
    clip_norm: Number = setting(1.0, "Norm to which the gradient of each document is clipped.", more_than=0,
        synonyms="max_grad_norm per_sample_clip")
    secure_noise: Flag = setting(False,
        "Noise of a cryptographic generator, safe against attacks on its last bits.", synonyms="secure_mode")


class CardRecipe(Section):
    """Facts that no measurement gives; `hf-genlm card RUN --set card.x=...` adds them later."""

    section: ClassVar[str] = "card"
    name: Word | None = setting(None, "Name of the model. null: that of the run folder.",
        synonyms="model_name title")
    license: Word | None = setting(None,
        "The Hub's identifier, such as mit; other: with the next two. null: not stated.", synonyms="licence")
    license_name: Word | None = setting(None, "Name of a license that the Hub has no identifier for.")
    license_link: Word | None = setting(None, "Its address, or LICENSE, a file beside the weights.")
    corpus: Word | None = setting(None, "Name of the training text. null: its files.",
        synonyms="dataset_name")
    language: Words = setting([], "ISO 639 codes. Empty: those of `corpus.languages`.",
        synonyms="languages lang")
    authors: Words = setting([], "Authors of the model.", synonyms="author")
    url: Word | None = setting(None, "Page that describes the model.", synonyms="homepage link")
    citation: Word | None = setting(None, "BibTeX. null: made of the fields above.", synonyms="bibtex cite")
    intended_use: Word | None = setting(None, "Purpose of the model, in words.", synonyms="use purpose")
    datasets: Words = setting([], "Hub ids of data sets, besides sources that are such.", synonyms="dataset")
    base_model: Word | None = setting(None,
        "Hub id of the base model. null: that of `model.init_from`, where it has one.")
    private_figures: Flag = setting(False,
        "Show figures of a run with `privacy.epsilon` that its guarantee does not cover.")
    tags: Words = setting([], "Tags on the Hub, besides those of the decoder.", synonyms="keywords")
