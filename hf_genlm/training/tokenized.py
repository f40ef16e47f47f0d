"""The corpus of a run as token ids, and the tokenizer that made them."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_genlm.config.recipe import Recipe, TrainingRecipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.languages import count_documents, measure_corpus_tokenization
from hf_genlm.evaluation.measurement import write_measurements
from hf_genlm.files import atomic_folder, read_json, write_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import CorpusFile
from hf_genlm.text.cache import ArrayWriter, Cache, cache_folder
from hf_genlm.text.canaries import Canaries, plant
from hf_genlm.text.corpus import Corpus, check_same, count_text, notes_on, read_corpus
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents, tokenized_of
from hf_genlm.text.languages import BalancedRows, balanced_text, repeats_of, spans
from hf_genlm.text.packing import DocumentWindows, PackedRows
from hf_genlm.text.store import Documents
from hf_genlm.text.tokenizer import load_tokenizer, train_tokenizer
from hf_genlm.training import processes
from hf_genlm.training.callbacks import WordRate
from hf_genlm.training.private import public_text
from hf_genlm.training.word_vectors import count_words

_IDS_AT_ONCE = 1 << 22
_SHARED = "train"


@dataclasses.dataclass
class TokenizedCorpus:
    """Both splits as token ids, with the tokenizer that made them.

    `words` counts those of the training text, for word vectors alone: otherwise it is empty.
    `validation_words` (n,) is how many each validation document has; None where that text is not at hand.
    `train_words` is their number in the training text, where it is asked for. `languages` is what corpus.json
    says of each, nothing where none were named.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenizedDocuments
    validation: TokenizedDocuments
    words: dict[str, int]
    _: dataclasses.KW_ONLY
    validation_words: np.ndarray | None = None
    train_words: int | None = None
    languages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Of the training text."""
        return self.train.n_tokens

    def windows(self, training: TrainingRecipe) -> DocumentWindows:
        """What a resolved recipe of a private run trains on."""
        special = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return DocumentWindows(self.train, training.max_seq_length, *special)

    def rows(self, training: TrainingRecipe) -> PackedRows | BalancedRows:
        """What a resolved recipe trains on."""
        max_seq_length = training.max_seq_length
        ids = {"eos_id": self.tokenizer.eos_token_id, "pad_id": self.tokenizer.pad_token_id}
        repeats = repeats_of(self.languages)
        if repeats is None:
            return PackedRows(self.train, max_seq_length, **ids, carries_state=training.carry_state)
        n_documents = count_documents(self.languages, "train")
        return BalancedRows(self.train, n_documents, repeats, max_seq_length, **ids)

    def word_rate(self, rows: PackedRows | BalancedRows) -> WordRate:
        """Words a token, of the whole training text."""
        return WordRate(self.train_words, rows.n_rows * (rows.max_seq_length - 1))

    def known_ids(self, rows: PackedRows | BalancedRows) -> np.ndarray:
        """(n,): all of the training text that is at hand as ids."""
        return self.train.ids


def prepare_corpus(run: RunFolder, recipe: Recipe, is_resuming: bool = False) -> TokenizedCorpus:
    """Read, split and tokenize the corpus; writes corpus.json and tokenizer/.

    With `is_resuming`, for a run that has begun: by the tokenizer that lies there.

    Of several processes the first one does. The others wait, and read the training ids that it leaves in the
    run folder for so long: they have no words, and no validation split.

    Raises:
        UserError: a source that cannot be used or is not what it was when the run began, or a run folder that
            another machine does not see.
    """
    if processes.count() == 1:
        return _prepare(run, recipe, is_resuming)
    found: list[TokenizedCorpus] = []

    def leave() -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
        found.append(_prepare(run, recipe, is_resuming))
        _leave(found[0].train, run)
        return found[0].tokenizer, found[0].languages

    tokenizer, languages = processes.from_first(leave)
    if not found:
        recipe.tokenizer.vocab_size = len(tokenizer)
    train = processes.together(lambda: found[0].train if found else _take(run))
    if found:
        shutil.rmtree(run.shared)
        return found[0]
    return TokenizedCorpus(tokenizer, train, train[:0], {}, languages=languages)


def _leave(documents: TokenizedDocuments, run: RunFolder) -> None:
    """For the other processes."""
    shutil.rmtree(run.shared, ignore_errors=True)  # of a run that was killed meanwhile
    with ArrayWriter(Cache(run.shared), _SHARED) as writer:
        for start in range(0, max(1, documents.n_tokens), _IDS_AT_ONCE):
            writer.append("ids", documents.ids[start : start + _IDS_AT_ONCE])
        writer.append("offsets", documents.offsets)
        writer.append("n_bytes", documents.n_bytes)
        writer.finish()


def _take(run: RunFolder) -> TokenizedDocuments:
    file = Cache(run.shared).load(_SHARED)
    if file is None:
        raise UserError(
            f"process {processes.index()} cannot read {str(run.shared)!r}: name by --out a folder on a disk "
            "that all machines share"
        )
    return tokenized_of(file)


def _prepare(run: RunFolder, recipe: Recipe, is_resuming: bool) -> TokenizedCorpus:
    def note(message: str) -> None:
        run.log("note", message=message)

    cache = Cache(cache_folder() if recipe.corpus.cache else None, note)
    corpus = read_corpus(
        recipe.corpus,
        lambda done, total: run.tell("progress", task="comparing documents", done=done, total=total),
    )
    canaries = plant(corpus, recipe.privacy)
    run.log("corpus", **{name: corpus.report[name] for name in ("description", "train", "validation")})
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
        documents, n_bytes = public_text(note)
    sha256 = text["sha256"] if documents is corpus.train else count_text(documents)["sha256"]
    tokenizer = tokenizer_of(run, recipe, documents, n_bytes, is_resuming, cache, sha256)
    words = count_words(corpus.train) if recipe.vectors.path is not None else {}
    if recipe.training.milestone_words:
        run.tell("progress", task="counting words", done=0, total=None)
        corpus.report["train"]["words"] = corpus.train.total_words()
    train, validation = _encode_splits(run, tokenizer, corpus, cache, note)
    tokenized = TokenizedCorpus(
        tokenizer,
        train,
        validation,
        words,
        validation_words=corpus.validation.count_words(),
        train_words=corpus.report["train"].get("words"),
        languages=languages,
    )
    write_json(run.corpus, corpus.report, CorpusFile)
    if languages:
        write_measurements(
            run.languages, measure_corpus_tokenization(tokenizer, corpus.validation, languages, recipe.corpus)
        )
    run.log(
        "tokenized",
        vocab_size=len(tokenizer),
        train_tokens=tokenized.train.n_tokens,
        validation_tokens=tokenized.validation.n_tokens,
        bytes_per_token=round(
            corpus.report["validation"]["bytes"] / max(1, tokenized.validation.n_tokens), 3
        ),
    )
    return tokenized


def tokenizer_of(
    run: RunFolder,
    recipe: Recipe,
    documents: Documents,
    n_bytes: int,
    is_resuming: bool,
    cache: Cache | None = None,
    sha256: str | None = None,
) -> PreTrainedTokenizerBase:
    """The recipe's own tokenizer, or one that is trained on `documents`, of a text of `n_bytes`; saved to
    tokenizer/. With `is_resuming`, the one that lies there."""
    path = str(run.tokenizer) if is_resuming else recipe.tokenizer.path
    if path is not None:
        tokenizer = load_tokenizer(path)
        if tokenizer.bos_token is None:
            tokenizer.bos_token = tokenizer.eos_token  # as in our own: what stands before a document
    else:
        run.tell("progress", task="tokenizer", done=0, total=None)
        tokenizer = train_tokenizer(documents, recipe.tokenizer, n_bytes, cache, sha256)
    recipe.tokenizer.vocab_size = len(tokenizer)
    if not is_resuming:  # a kill in mid-writing would take from a run the one that it has
        with atomic_folder(run.tokenizer, replace=True) as folder:
            tokenizer.save_pretrained(folder)
    return tokenizer


def _encode_splits(
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    cache: Cache,
    note: Callable[[str], None],
) -> Sequence[TokenizedDocuments]:
    encoded = []
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):

        def on_progress(done: int, total: int, split: str = split) -> None:
            run.tell("progress", task=f"encoding {split}", done=done, total=total)

        sha256 = corpus.report[split]["sha256"]
        encoded.append(encode_documents(tokenizer, documents, on_progress, note, cache, sha256))
        corpus.report[split]["tokens"] = encoded[-1].n_tokens
        languages = corpus.report.get("languages", {})
        for code, span in spans(count_documents(languages, split)).items():
            languages[code][split]["tokens"] = encoded[-1][span].n_tokens
    return encoded
