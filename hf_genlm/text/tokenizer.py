"""Byte-level BPE tokenizers: train one, or load one.

Any Unicode text comes back unchanged from its ids: there is no normalizer and no unknown token.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.files import atomic_folder, read, refuse_links_out, require_new_folder
from hf_genlm.memory import check_sizes, give_back_memory
from hf_genlm.run_folder import Listener
from hf_genlm.run_schemas import TokenizerFile
from hf_genlm.text.cache import ArrayWriter, Cache, key_of
from hf_genlm.text.corpus import notes_on, read_documents, with_sources
from hf_genlm.text.encoding import encode_documents, pieces
from hf_genlm.text.fast_bpe import MAX_TOKEN, PATTERNS, bounded, pre_tokenizer
from hf_genlm.text.languages import balanced_text, check_languages
from hf_genlm.text.sources import Sources
from hf_genlm.text.store import TURN, Document, Documents, as_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # before and after every document: both bos and eos
PAD = "<|pad|>"
# what `encode_documents` makes of a chat; TRL trains on what stands between the marks of a generation
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ (message['content'] or '') | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ (message['content'] or '') | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
MAX_CHOSEN_VOCAB_SIZE = 32768
_MIN_CHOSEN_VOCAB_SIZE = 512

_SAMPLE_PIECE = 8192  # characters, when only a part of the text trains the merges
_WHOLE_PIECE = 1 << 16  # characters, when all of it does
# UTF-8 bytes of different words that train the merges: a byte takes some 100 in memory
_MAX_WORD_BYTES = 6_000_000
_SIGNS = r"!-/:-@\[-`{-~\u3000-\u3003\uff01-\uff0f\uff1a-\uff20"
_WORD = re.compile(rf"[^\s\d{_SIGNS}]+|\d{{1,3}}|[{_SIGNS}]+|\s{{2,}}")  # about a pre-token


@dataclass(frozen=True, eq=False)
class TrainedTokenizer:
    """A tokenizer that `train_tokenizer_on` saved to the folder `path`, and the text that it was trained on.

    `report` describes the text as `read_documents` does; `n_tokens` is the length of the text in tokens.
    """

    path: Path
    tokenizer: "PreTrainedTokenizerFast"
    documents: Documents
    report: dict[str, Any]
    n_tokens: int

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.report["bytes"]

    @property
    def languages(self) -> dict[str, dict[str, Any]]:
        """Counts and balance of each language by its code; empty for text without languages."""
        return self.report.get("languages", {})


def train_tokenizer_on(
    sources: Sources,
    *,
    out: str | Path,
    tokenizer: TokenizerRecipe | None = None,
    corpus: CorpusRecipe | None = None,
    listener: Listener | None = None,
) -> TrainedTokenizer:
    """Train a tokenizer on all text of `sources`, none of it held out, and save it.

    Args:
        sources: files, folders, globs or Hub data sets, or a mapping from language code to such a list.
        out: the folder to write; it must not exist or must be empty.
        tokenizer: vocabulary size, pattern and limits; the defaults if None.
        corpus: how the sources are read and the languages balanced; the defaults if None.
        listener: receives the events `note` and `progress`.

    Raises:
        UserError: a source cannot be used, `out` holds files or cannot be written, or the text cannot fill
            the vocabulary.
    """
    tell = listener or (lambda event, fields: None)
    out = Path(out)
    if not sources:
        raise UserError("there is no text: name a SOURCE, or several by language with --source CODE=SOURCE")
    require_new_folder(out)
    corpus = with_sources(corpus or CorpusRecipe(), sources)
    check_languages(corpus)
    tell("progress", {"task": "reading", "done": 0, "total": None})
    documents, report = read_documents(sources, corpus)
    for message in notes_on(report):
        tell("note", {"message": message})
    tell("progress", {"task": "training the tokenizer", "done": 0, "total": None})
    text = balanced_text(documents, report.get("languages", {}))
    trained = train_tokenizer(text, tokenizer or TokenizerRecipe(), report["bytes"])
    with atomic_folder(out) as folder:
        trained.save_pretrained(folder)
    n_tokens = encode_documents(
        trained,
        documents,
        lambda done, total: tell("progress", {"task": "encoding", "done": done, "total": total}),
    ).n_tokens
    return TrainedTokenizer(out, trained, documents, report, n_tokens)


def choose_vocab_size(n_bytes: int) -> int:
    """Vocabulary size for a corpus of `n_bytes` UTF-8 bytes: it doubles when the corpus grows fourfold.

    1,024 from 0.8 MB, 2,048 from 3.2 MB, 4,096 from 12.8 MB, and so on from 512 to 32,768: in a small corpus
    the tokens of a larger vocabulary are too rare, and cost a small model more than shorter texts save.
    """
    exponent = math.floor(10 + math.log2(max(n_bytes, 1) / 0.8e6) / 2)
    return min(max(2**exponent, _MIN_CHOSEN_VOCAB_SIZE), MAX_CHOSEN_VOCAB_SIZE)


def train_tokenizer(
    documents: Iterable[Document],
    recipe: TokenizerRecipe,
    n_bytes: int,
    cache: Cache | None = None,
    sha256: str | None = None,
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer on at most `recipe.max_characters`, taken evenly from all of the text.

    They are fewer if their words seldom repeat, as in scripts without spaces, so that memory is bounded. A
    word of more than 1,024 characters trains the merges in pieces of this length, and no token is longer than
    128 bytes; honest text has none. Encoding adds no special token by itself (GPT-2's convention).
    `model_max_length` is left to the caller.

    Args:
        n_bytes: size of the corpus, which decides the vocabulary size if `recipe.vocab_size` is None; a text
            too small to fill that gets a smaller vocabulary.
        cache, sha256: where a tokenizer of the same text and settings is looked up and stored, and the hash
            of the text.

    Raises:
        UserError: `vocab_size` is more than the text can fill.
    """
    vocab_size = recipe.vocab_size or choose_vocab_size(n_bytes)
    key = None
    if cache is not None and sha256 is not None:
        key = key_of(
            kind="tokenizer", text=sha256, vocab_size=vocab_size, max_characters=recipe.max_characters,
            library=tokenizers.__version__,
            rules=[bounded(PATTERNS[recipe.pattern]), END_OF_TEXT, PAD, _SAMPLE_PIECE, _WHOLE_PIECE,
                   _MAX_WORD_BYTES, MAX_TOKEN],
        )  # fmt: skip
        found = cache.load(key)
        with contextlib.suppress(Exception):  # of the library, for an entry that is no tokenizer
            if found is not None:
                return wrap_tokenizer(Tokenizer.from_str(found.arrays["json"].tobytes().decode("utf-8")))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(bounded(PATTERNS[recipe.pattern]))
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a merge seen once memorises
        special_tokens=[AddedToken(END_OF_TEXT, normalized=False), AddedToken(PAD, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN,
        show_progress=False,
    )
    documents = as_documents(documents)
    n_characters = min(recipe.max_characters, documents.n_characters)
    is_large = documents.n_bytes.sum() > _MAX_WORD_BYTES
    while is_large and n_characters > _WHOLE_PIECE and not _fits(sample_evenly(documents, n_characters)):
        n_characters //= 2
    texts = sample_evenly(documents, n_characters, recipe.pattern)
    if documents.is_chat.any():
        texts = (text.replace(TURN, "\n") for text in texts)
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = pre_tokenizer(PATTERNS[recipe.pattern])
    del trainer
    give_back_memory()
    reached = backend.get_vocab_size()
    if recipe.vocab_size is not None and reached < recipe.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size = {recipe.vocab_size}: this text fills {reached} at most; "
            f"set it to {reached} or less, or leave it out to have it chosen"
        )
    if cache is not None and key is not None:
        with ArrayWriter(cache, key) as writer:
            writer.append("json", np.frombuffer(backend.to_str().encode("utf-8"), dtype=np.uint8))
            writer.finish()
    return wrap_tokenizer(backend)


def _fits(texts: Iterable[str]) -> bool:
    """True if the different words of `texts` have at most `_MAX_WORD_BYTES`."""
    words: set[int] = set()
    n_bytes = 0
    for text in texts:
        new = set(_WORD.findall(text))
        n_bytes += sum(len(word.encode()) for word in new if hash(word) not in words)
        words.update(map(hash, new))
        if n_bytes > _MAX_WORD_BYTES:
            return False
    return True


def sample_evenly(documents: Iterable[Document], max_characters: int, pattern: str = "own") -> Iterator[str]:
    """All texts if they have at most `max_characters`, otherwise evenly spaced pieces, as many as fit.

    Long texts come in pieces that end where a word of `pattern` ends.
    """
    documents = as_documents(documents)
    total = documents.n_characters
    if total <= max_characters:
        yield from (text for _, text in pieces(documents, pattern == "own", _WHOLE_PIECE))
        return
    piece = max(1, min(_SAMPLE_PIECE, max_characters // 16))
    passed = taken = 0
    for text in _pieces(documents, piece):
        passed += len(text)
        if (taken + len(text)) * total <= max_characters * passed:
            taken += len(text)
            yield text


def _pieces(documents: Documents, length: int) -> Iterator[str]:
    """Cut every document into pieces of `length` characters; its last piece may be shorter."""
    for _, parts in itertools.groupby(documents.texts(), key=lambda part: part[0]):
        rest = ""
        for _, part in parts:
            text = rest + part
            whole = len(text) - len(text) % length
            yield from (text[start : start + length] for start in range(0, whole, length))
            rest = text[whole:]
        if rest:
            yield rest


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer folder, to use instead of training one.

    Raises:
        UserError: nothing loads from `path`, a link leads out of it, or the tokenizer lacks an end-of-text
            token or a separate pad token.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise UserError(f"tokenizer.path = {str(path)!r} is no folder: name one that save_pretrained wrote")
    refuse_links_out(path)
    check_sizes(path)
    try:
        if (file := Path(path) / "tokenizer.json").is_file():
            read(file, TokenizerFile)
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a broken folder raises anything, from KeyError to the Rust library's own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"tokenizer.path = {str(path)!r} holds no tokenizer that loads ({reason}): "
            "name a folder that save_pretrained wrote"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer.path = {str(path)!r} has no tokenizer.json: convert it to a fast tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer.path = {str(path)!r} has no eos_token, which ends every document: "
            "set one and save the tokenizer again"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer.path = {str(path)!r} has no pad_token of its own, apart from "
            f"{tokenizer.eos_token!r}: add one "
            "with tokenizer.add_special_tokens({'pad_token': '<|pad|>'}) and save the tokenizer again"
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def wrap_tokenizer(backend: Tokenizer) -> "PreTrainedTokenizerFast":
    """The tokenizer of transformers, with our special tokens, around a trained `backend`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD, unk_token=None,
        padding_side="left", model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
