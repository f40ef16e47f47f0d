"""The corpus of a run that reads it while it trains, and its place in a checkpoint."""

import dataclasses
import typing
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_genlm.config.recipe import Recipe, TrainingRecipe
from hf_genlm.errors import UserError
from hf_genlm.files import read_json, write_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import CorpusFile
from hf_genlm.text.corpus import check_same, touched
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.store import Documents
from hf_genlm.text.streaming import DocumentStream, HeldOut, beginning, open_stream, read_stream
from hf_genlm.training import processes
from hf_genlm.training.bigram_init import MAX_COUNTED_TOKENS
from hf_genlm.training.callbacks import WordRate
from hf_genlm.training.tokenized import tokenizer_of
from hf_genlm.training.word_vectors import count_words

_COUNTED_CHARACTERS = 1_000_000


@dataclasses.dataclass
class StreamedCorpus:
    """A training text that is read again in every pass, and a validation text as token ids.

    As `TokenizedCorpus`; `words` are those of the text that the tokenizer was trained on.
    """

    tokenizer: PreTrainedTokenizerBase
    stream: DocumentStream
    validation: TokenizedDocuments
    words: dict[str, int]
    shuffle_buffer: int
    run: RunFolder
    validation_words: np.ndarray | None = None
    rate: WordRate | None = None  # of the beginning of the text, where it is asked for

    n_tokens = None  # not known
    languages: typing.ClassVar[dict[str, Any]] = {}  # not told apart in a stream

    def word_rate(self, rows: PackedStream) -> WordRate:
        """Words a token, of the beginning of the text."""
        return self.rate

    def rows(self, training: TrainingRecipe) -> PackedStream:
        """What a resolved recipe trains on."""
        return PackedStream(
            self.stream,
            self.tokenizer,
            max_seq_length=training.max_seq_length,
            shuffle_buffer=self.shuffle_buffer,
            seed=training.seed,
            note=lambda message: self.run.log("note", message=message),
        )

    def known_ids(self, rows: PackedStream) -> np.ndarray:
        """(n,): the beginning of the training text."""
        return rows.first_tokens(MAX_COUNTED_TOKENS)


def prepare_stream(run: RunFolder, recipe: Recipe, is_resuming: bool = False) -> StreamedCorpus:
    """Open the stream, hold out its validation text, and train the tokenizer on the beginning of the rest;
    writes corpus.json and tokenizer/. With `is_resuming`, for a run that has begun: by its tokenizer.

    Of several processes the first one does, and alone has the validation text; the others open the stream
    too.

    The beginning is `tokenizer.max_characters` long. The vocabulary is chosen by the bytes of the files, or
    of that beginning, where they are less.
    """
    made: list[StreamedCorpus] = []

    def make() -> tuple[PreTrainedTokenizerBase, HeldOut]:
        made.append(_prepare(run, recipe, is_resuming))
        return made[0].tokenizer, made[0].stream.held

    tokenizer, held = processes.from_first(make)
    if made:
        return made[0]
    recipe.tokenizer.vocab_size = len(tokenizer)
    stream, none = dataclasses.replace(open_stream(recipe.corpus), held=held), np.zeros(0, dtype=np.int64)
    nothing = TokenizedDocuments(none, np.zeros(1, dtype=np.int64), none)
    return StreamedCorpus(tokenizer, stream, nothing, {}, recipe.corpus.shuffle_buffer, run)


def _prepare(run: RunFolder, recipe: Recipe, is_resuming: bool) -> StreamedCorpus:
    run.tell("progress", task="beginning of the stream", done=0, total=None)
    found = read_stream(recipe.corpus)
    stream, report = found.stream, found.report
    run.log("corpus", **{name: report[name] for name in ("description", "train", "validation")})
    if is_resuming:
        before = read_json(run.corpus, CorpusFile)
        check_same(before, report)
        for message in touched(before, report):
            run.log("note", message=message)
    text = beginning(stream, recipe.tokenizer.max_characters)
    n_bytes = max(stream.n_bytes, int(text.n_bytes.sum()))
    tokenizer = tokenizer_of(run, recipe, text, n_bytes, is_resuming)
    validation = encode_documents(tokenizer, found.validation)
    report["validation"]["tokens"] = validation.n_tokens
    write_json(run.corpus, report, CorpusFile)
    run.log(
        "tokenized",
        vocab_size=len(tokenizer),
        train_tokens=None,
        validation_tokens=validation.n_tokens,
        bytes_per_token=round(report["validation"]["bytes"] / max(1, validation.n_tokens), 3),
    )
    words = count_words(text) if recipe.vectors.path is not None else {}
    n_words = found.validation.count_words()
    rate = _rate_of(text, tokenizer) if recipe.training.milestone_words else None
    return StreamedCorpus(
        tokenizer, stream, validation, words, recipe.corpus.shuffle_buffer, run, n_words, rate
    )


def _rate_of(text: Documents, tokenizer: PreTrainedTokenizerBase) -> WordRate:
    """Words a token in the first documents of `text`: a million characters, and to the end of one."""
    n = int(np.searchsorted(np.cumsum(text.characters), _COUNTED_CHARACTERS)) + 1
    found = encode_documents(tokenizer, text[:n])
    return WordRate(text[:n].total_words(), found.n_tokens + len(found))


class StreamCallback(TrainerCallback, ExportableState):
    """Keeps the place in a stream in Trainer's checkpoints, and goes on from there when Trainer resumes.

    It lies in trainer_state.json (`stateful_callbacks`), which Trainer writes with the checkpoint: there is
    none without the other. It is that behind the last row trained on, whatever was fetched beyond. Give it to
    Trainer with its other callbacks; nothing more is needed to resume.
    """

    def __init__(self, rows: PackedStream, rows_per_step: int):
        """`rows_per_step`: of an optimizer step, over accumulation and all processes."""
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
        # a loader draws a seed when it begins: not from the numbers of the dropout, which a checkpoint has
        train_dataloader.base_dataloader.generator = torch.Generator()

    def on_step_end(self, args, state, control, **kwargs):
        self._step = state.global_step

    def state(self) -> dict[str, Any]:
        """What Trainer writes to a checkpoint."""
        n_rows = self._row_of_step_0 + self._step * self.rows_per_step
        return {"args": {}, "attributes": {"stream": self.rows.state_after(n_rows)}}
