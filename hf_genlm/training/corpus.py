"""The corpus of a run as token ids, in memory or as a stream, and the tokenizer that made them."""

import dataclasses
import shutil
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_genlm.config.recipe import CorpusRecipe, Recipe
from hf_genlm.config.settings import TrainingSettings
from hf_genlm.errors import UserError
from hf_genlm.evaluation.languages import count_documents, measure_corpus_tokenization
from hf_genlm.evaluation.measurement import write_measurements
from hf_genlm.files import atomic_folder, read_json, write_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import CorpusFile
from hf_genlm.text.cache import ArrayWriter, Cache, usable_cache
from hf_genlm.text.canaries import Canaries, plant
from hf_genlm.text.corpus import TO_KEEP, Corpus, check_same, count_text, notes_on, read_corpus
from hf_genlm.text.duplicates import share_found
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents, tokenized_of
from hf_genlm.text.languages import (
    BYTES_PER_WORD,
    BalancedRows,
    balanced_text,
    milestone_words,
    repeats_of,
    spans,
)
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.packing import DocumentWindows, PackedRows
from hf_genlm.text.store import Documents
from hf_genlm.text.streaming import DocumentStream, HeldOut, StreamedText, open_stream, read_stream, sample
from hf_genlm.text.tokenizer import CHAT_TEMPLATE, load_tokenizer, train_tokenizer
from hf_genlm.training import processes
from hf_genlm.training.bigram_init import MAX_COUNTED_TOKENS
from hf_genlm.training.callbacks import WordRate
from hf_genlm.training.word_vectors import count_words

Rows = PackedRows | BalancedRows | PackedStream | DocumentWindows
_SHOWN = ("description", "train", "validation", "held_out_in_training")  # of the report, in the log
_IDS_AT_ONCE = 1 << 22
_SHARED = "train"
_COUNTED_CHARACTERS = 1_000_000


@dataclasses.dataclass
class TokenizedCorpus:
    """Both splits as token ids, with the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenizedDocuments
    validation: TokenizedDocuments
    words: dict[str, int]  # counts in the training text; empty without word vectors
    _: dataclasses.KW_ONLY
    validation_words: np.ndarray | None = None  # (n,) of each validation document; None: text not at hand
    train_words: int | None = None  # in the training text; counted for milestones alone
    languages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # as in corpus.json

    @property
    def n_tokens(self) -> int:
        """Tokens of the training text."""
        return self.train.n_tokens

    @property
    def n_targets(self) -> tuple[int, ...]:
        """Tokens that an epoch predicts, the end of each document included; by language, if balanced."""
        parts = {"": slice(0, len(self.train))}
        if repeats_of(self.languages) is not None:
            parts = spans(count_documents(self.languages, "train"))
        return tuple(self.train[part].n_tokens + len(self.train[part]) for part in parts.values())

    def windows(self, training: TrainingSettings) -> DocumentWindows:
        """Rows of a private run: one window of each drawn document.

        Raises:
            UserError: some documents are chats.
        """
        if self.train.targets is not None:
            raise UserError(
                "--epsilon is for text, and some documents are chats: leave it out, or write them as text"
            )
        special = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return DocumentWindows(self.train, training.max_seq_length, *special)

    def rows(self, training: TrainingSettings) -> PackedRows | BalancedRows:
        """Packed rows to train on."""
        max_seq_length = training.max_seq_length
        ids = {"eos_id": self.tokenizer.eos_token_id, "pad_id": self.tokenizer.pad_token_id}
        repeats = repeats_of(self.languages)
        if repeats is None:
            return PackedRows(self.train, max_seq_length, **ids, carries_state=training.carry_state)
        return BalancedRows(
            self.train, count_documents(self.languages, "train"), repeats, max_seq_length, **ids
        )

    def word_rate(self, rows: PackedRows | BalancedRows) -> WordRate:
        """Words per token of the whole training text."""
        assert self.train_words is not None
        return WordRate(self.train_words, rows.n_targets)

    def known_ids(self, rows: PackedRows | BalancedRows) -> np.ndarray:
        """(n,) token ids of the whole training text."""
        return self.train.ids


@dataclasses.dataclass
class StreamedCorpus:
    """A training text that is read again in every epoch, and a validation text as token ids.

    The fields are those of `TokenizedCorpus`; `words` are counted in the text that the tokenizer was trained
    on.
    """

    tokenizer: PreTrainedTokenizerFast
    stream: DocumentStream
    validation: TokenizedDocuments
    words: dict[str, int]
    shuffle_buffer: int
    run: RunFolder
    validation_words: np.ndarray | None = None
    rate: WordRate | None = None  # of a sample of the text; counted for milestones alone

    n_tokens = n_targets = None  # unknown
    languages: typing.ClassVar[dict[str, Any]] = {}  # not distinguished in a stream

    def word_rate(self, rows: PackedStream) -> WordRate:
        """Words per token of a sample of the text."""
        assert self.rate is not None
        return self.rate

    def rows(self, training: TrainingSettings) -> PackedStream:
        """Packed rows to train on."""
        return PackedStream(
            self.stream, self.tokenizer, max_seq_length=training.max_seq_length,
            shuffle_buffer=self.shuffle_buffer, seed=training.seed,
            note=lambda message: self.run.log("note", message=message),
        )  # fmt: skip

    def known_ids(self, rows: PackedStream) -> np.ndarray:
        """(n,) token ids of a sample of the training text."""
        return rows.first_tokens(MAX_COUNTED_TOKENS)


def prepare_corpus(run: RunFolder, recipe: Recipe, is_resuming: bool = False) -> TokenizedCorpus:
    """Read, split and tokenize the corpus; write corpus.json and tokenizer/.

    Of several processes the first one does this. The others wait, then read the training ids that it leaves
    in the run folder for so long; they have no words, and no validation split.

    Args:
        recipe: as `settle_reading` returns it.
        is_resuming: use the tokenizer in the run folder, and require the text that the run began with.

    Raises:
        UserError: a source that cannot be used or is not what it was when the run began, or a run folder that
            another machine does not see.
    """
    if processes.count() == 1:
        return _tokenize(run, recipe, is_resuming)
    found: list[TokenizedCorpus] = []

    def write_shared() -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
        found.append(_tokenize(run, recipe, is_resuming))
        documents = found[0].train
        shutil.rmtree(run.shared, ignore_errors=True)  # of a run that was killed here
        with ArrayWriter(Cache(run.shared), _SHARED) as writer:
            for start in range(0, max(1, documents.n_tokens), _IDS_AT_ONCE):
                writer.append("ids", documents.ids[start : start + _IDS_AT_ONCE])
            writer.append("offsets", documents.offsets)
            writer.append("n_bytes", documents.n_bytes)
            if documents.targets is not None:
                writer.append("targets", documents.targets)
            writer.finish()
        return found[0].tokenizer, found[0].languages

    def read_shared() -> TokenizedDocuments:
        file = Cache(run.shared).load(_SHARED)
        if file is None:
            raise UserError(
                f"process {processes.index()} cannot read {str(run.shared)!r}: name by --out a folder on a "
                "disk that all machines share"
            )
        return tokenized_of(file)

    tokenizer, languages = processes.from_first(write_shared)
    train = processes.in_every_process(lambda: found[0].train if found else read_shared())
    if found:
        shutil.rmtree(run.shared)
        return found[0]
    return TokenizedCorpus(tokenizer, train, train[:0], {}, languages=languages)


def _tokenize(run: RunFolder, recipe: Recipe, is_resuming: bool) -> TokenizedCorpus:
    def note(message: str) -> None:
        run.log("note", message=message)

    cache = usable_cache(recipe.corpus.cache, note)
    corpus = read_corpus(
        recipe.corpus,
        lambda done, total: run.tell("progress", task="comparing documents", done=done, total=total),
    )
    canaries = plant(corpus, recipe.privacy)
    run.log("corpus", **{name: corpus.report.get(name) for name in _SHOWN})
    if recipe.corpus.languages:
        run.log("languages", languages=corpus.report["languages"])
    for message in notes_on(corpus.report):
        note(message)
    if is_resuming:
        check_same(read_json(run.corpus, CorpusFile), corpus.report)
    if canaries is not None:
        write_json(run.canaries, dataclasses.asdict(canaries), Canaries)
    text, languages = corpus.report["train"], corpus.report.get("languages", {})
    documents, n_bytes = balanced_text(corpus.train, languages), text["bytes"]
    if recipe.privacy.epsilon is not None and recipe.tokenizer.path is None and not is_resuming:
        documents, n_bytes = _public_text(note)
    sha256 = text["sha256"] if documents is corpus.train else count_text(documents)["sha256"]
    tokenizer = _tokenizer_of(run, recipe, documents, n_bytes, is_resuming, cache, sha256)
    words = count_words(corpus.train) if recipe.vectors.path is not None else {}
    if recipe.training.milestone_words:
        run.tell("progress", task="counting words", done=0, total=None)
        counts = count_documents(languages, "train")
        corpus.report["train"]["words"], premiums = milestone_words(corpus.train, recipe.corpus, counts)
        _note_premiums(run, premiums)
    train, validation = _encode_splits(run, tokenizer, corpus, cache, note)
    write_json(run.corpus, corpus.report, CorpusFile)
    if languages:
        measured = measure_corpus_tokenization(tokenizer, corpus.validation, languages, recipe.corpus)
        write_measurements(run.languages, measured)
    validation_bytes = corpus.report["validation"]["bytes"]
    _log_tokenized(run, tokenizer, train.n_tokens, validation.n_tokens, validation_bytes)
    return TokenizedCorpus(
        tokenizer, train, validation, words,
        validation_words=None if corpus.report.get("chats") else corpus.validation.count_words(),
        train_words=corpus.report["train"].get("words"), languages=languages,
    )  # fmt: skip


def _public_text(note: Callable[[str], None]) -> tuple[Documents, int]:
    """(documents, bytes) of a public text for the vocabulary of a private run: Python's library source."""
    note(
        "the vocabulary is learned from Python's library source, as it must not be from a private text; a "
        "tokenizer of public text of its kind serves better: --set tokenizer.path=FOLDER (hf-genlm tokenizer)"
    )
    corpus = read_corpus(CorpusRecipe())
    return corpus.train, corpus.report["train"]["bytes"]


def _tokenizer_of(
    run: RunFolder,
    recipe: Recipe,
    documents: Documents,
    n_bytes: int,
    is_resuming: bool,
    cache: Cache | None = None,
    sha256: str | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe names, or one trained on `documents` of a text of `n_bytes`; saved to
    tokenizer/. When resuming, that of the run folder."""
    path = str(run.tokenizer) if is_resuming else recipe.tokenizer.path
    if path is not None:
        tokenizer = load_tokenizer(path)
        if tokenizer.bos_token is None:
            tokenizer.bos_token = tokenizer.eos_token  # as our own have it: it stands before a document
    else:
        run.tell("progress", task="tokenizer", done=0, total=None)
        tokenizer = train_tokenizer(documents, recipe.tokenizer, n_bytes, cache, sha256)
    if not is_resuming:
        if documents.is_chat.any():
            tokenizer.chat_template = CHAT_TEMPLATE
        save_tokenizer(run, tokenizer)
    return tokenizer


def save_tokenizer(run: RunFolder, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write tokenizer/ of the run folder."""
    with atomic_folder(run.tokenizer, replace=True) as folder:
        tokenizer.save_pretrained(folder)


def _encode_splits(
    run: RunFolder,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    cache: Cache,
    note: Callable[[str], None],
) -> list[TokenizedDocuments]:
    encoded = []
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):

        def on_progress(done: int, total: int, split: str = split) -> None:
            run.tell("progress", task=f"encoding {split}", done=done, total=total)

        sha256 = corpus.report[split]["sha256"]
        ends_chats = split == "validation"
        encoded.append(
            encode_documents(tokenizer, documents, on_progress, note, cache, sha256, ends_chats=ends_chats)
        )
        corpus.report[split]["tokens"] = encoded[-1].n_tokens
        languages = corpus.report.get("languages", {})
        for code, span in spans(count_documents(languages, split)).items():
            languages[code][split]["tokens"] = encoded[-1][span].n_tokens
    return encoded


def _log_tokenized(
    run: RunFolder, tokenizer: PreTrainedTokenizerFast, n_train: int | None, n_validation: int, n_bytes: int
) -> None:
    run.log(
        "tokenized",
        vocab_size=len(tokenizer),
        train_tokens=n_train,
        validation_tokens=n_validation,
        bytes_per_token=round(n_bytes / max(1, n_validation), 3),
    )


def prepare_stream(run: RunFolder, recipe: Recipe, is_resuming: bool = False) -> StreamedCorpus:
    """Open the stream, hold out its validation text, and train the tokenizer on a sample of the rest;
    write corpus.json and tokenizer/.

    Of several processes the first one does this, and alone has the validation text; the others open the
    stream too. The sample is `tokenizer.max_characters` long. The vocabulary is chosen by the bytes of the
    files, or of that sample, where they are fewer. `recipe` and `is_resuming` as for `prepare_corpus`.
    """
    made: list[StreamedCorpus] = []

    def make() -> tuple[PreTrainedTokenizerFast, HeldOut]:
        made.append(_open_stream(run, recipe, is_resuming))
        return made[0].tokenizer, made[0].stream.held_out

    tokenizer, held_out = processes.from_first(make)
    if made:
        return made[0]
    stream, none = (
        dataclasses.replace(open_stream(recipe.corpus), held_out=held_out),
        np.zeros(0, dtype=np.int64),
    )
    nothing = TokenizedDocuments(none, np.zeros(1, dtype=np.int64), none)
    return StreamedCorpus(tokenizer, stream, nothing, {}, recipe.corpus.shuffle_buffer, run)


def _open_stream(run: RunFolder, recipe: Recipe, is_resuming: bool) -> StreamedCorpus:
    run.tell("progress", task="sample of the stream", done=0, total=None)
    found = read_stream(recipe.corpus)
    stream, report = found.stream, found.report
    run.log("corpus", **{name: report.get(name) for name in _SHOWN})
    if is_resuming:
        before = read_json(run.corpus, CorpusFile)
        check_same(before, report)
        for message in _touched(before, report):
            run.log("note", message=message)
    text, is_all = sample(stream, recipe.tokenizer.max_characters)
    report["held_out_in_training"] = share_found(found.validation, text)
    report["notices"] += _copies_left_out(found)
    for message in notes_on(report):
        run.log("note", message=message)
    if not is_all or not found.is_all_searched:
        run.log("note", message=_sampling_note(stream))
    n_bytes = max(stream.n_bytes, int(text.n_bytes.sum()))
    tokenizer = _tokenizer_of(run, recipe, text, n_bytes, is_resuming)
    validation = encode_documents(tokenizer, found.validation)
    report["validation"]["tokens"] = validation.n_tokens
    write_json(run.corpus, report, CorpusFile)
    _log_tokenized(run, tokenizer, None, validation.n_tokens, report["validation"]["bytes"])
    words = count_words(text) if recipe.vectors.path is not None else {}
    n_words = found.validation.count_words()
    rate = None
    if recipe.training.milestone_words:  # words per token of about a million characters, evenly of the sample
        some = text[:: max(1, text.n_characters // _COUNTED_CHARACTERS)]
        encoded = encode_documents(tokenizer, some)
        n_words_of_some, premiums = milestone_words(some, recipe.corpus, {})
        _note_premiums(run, premiums)
        rate = WordRate(n_words_of_some, encoded.n_tokens + len(encoded))
    return StreamedCorpus(
        tokenizer, stream, validation, words, recipe.corpus.shuffle_buffer, run, n_words, rate
    )


def _touched(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for people about streamed files that were written to since, with the same size and samples: the
    files of both reports are the same, see `check_same`."""
    pairs = zip(before["files"], now["files"], strict=True)
    names = [new["name"] for old, new in pairs if old.get("modified") not in (None, new.get("modified"))]
    if not names:
        return []
    return [
        f"{', '.join(names[:3])} {'was' if len(names) == 1 else 'were'} written to since this run began, but "
        "keeps its size and what is sampled of it: stop here, unless the text is the same"
    ]


def _note_premiums(run: RunFolder, premiums: dict[str, float]) -> None:
    if premiums:
        message = (
            f"milestones count a script without spaces by bytes, {BYTES_PER_WORD} times its byte premium ("
            + ", ".join(f"{code} {premium:g}" for code, premium in premiums.items())
            + ") a word: for others, name languages by --source CODE=SOURCE and set corpus.byte_premiums"
        )
        run.log("note", message=message)


def _copies_left_out(found: StreamedText) -> list[str]:
    """A line for people about copies of held-out texts in the sample of a stream."""
    counts = found.stream.held_out.n_left_out
    is_chosen = found.report["split"]["method"] == "hash"  # from the stream: one of each is no copy
    n = counts.total() - is_chosen * len(counts)
    remedy = "hold out a file of your own by --validation, and to train on " if is_chosen else "to train on "
    line = (
        f"{n:,} copies of held-out texts in a sample of the stream left out, as all others: {remedy}{TO_KEEP}"
    )
    return [line] if n else []


def _sampling_note(stream: DocumentStream) -> str:
    """A line for people about the parts of a large stream that its tokenizer and held-out text come from."""
    stretches, partly = stream.stretches()
    message = (
        f"a sample from {len(stretches)} place{'s' if len(stretches) > 1 else ''} of the stream trains the "
        "tokenizer, is counted for the first weights, and is held out, unless it is small or they were named"
    )
    if partly:
        message += (
            f"; of {', '.join(partly[:3])}{' and others' * (len(partly) > 3)} only the beginning can be "
            "reached: unpack it, cut it into more files, or shuffle it, unless it is the same throughout"
        )
    return message


class StreamCallback(TrainerCallback, ExportableState):
    """Keep the position in a stream in Trainer's checkpoints, and continue there when Trainer resumes.

    The position is in trainer_state.json (`stateful_callbacks`), which Trainer writes with every checkpoint.
    It is that after the last row trained on, however many rows were fetched beyond it. Give the callback to
    Trainer with its other callbacks; nothing more is needed to resume.
    """

    def __init__(self, rows: PackedStream, rows_per_step: int):
        """`rows_per_step`: rows of an optimizer step, over accumulation and all processes."""
        self.rows, self.rows_per_step = rows, rows_per_step
        self._step = 0
        self._row_of_step_0 = 0

    def on_init_end(self, args, state, control, **kwargs):
        args.ignore_data_skip = True  # the stream begins where it has to

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step:
            saved = state.stateful_callbacks.get(type(self).__name__)
            if saved is None:
                raise UserError("the checkpoint has no place in a stream: its run was not one with --stream")
            self.rows.load_state_dict(saved["attributes"]["stream"])
        self._step = state.global_step
        self._row_of_step_0 = self.rows.state_dict()["rows"] - self._step * self.rows_per_step
        # a loader draws a seed when it begins: not from dropout's generator, whose state a checkpoint has
        train_dataloader.base_dataloader.generator = torch.Generator()

    def on_step_end(self, args, state, control, **kwargs):
        self._step = state.global_step

    def state(self) -> dict[str, Any]:
        """State that Trainer writes to a checkpoint."""
        n_rows = self._row_of_step_0 + self._step * self.rows_per_step
        return {"args": {}, "attributes": {"stream": self.rows.state_after(n_rows)}}
