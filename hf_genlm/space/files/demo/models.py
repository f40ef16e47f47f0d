"""Load the models that `space.json` names, and map their tokens to the characters of a text."""

import codecs
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MAX_PROMPT_TOKENS = 1024  # the last ones of a prompt are used; prompt and continuation: twice as many
MAX_CHARACTERS = 20_000  # of any input; the rest is cut off before any work is done
_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
_CONTEXT_TOKENS = 8  # tokens decoded before a span, because they decide about its spaces
_MAX_CHARACTER_TOKENS = 4  # a character has at most 4 bytes in UTF-8


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer."""

    name: str
    module: Any
    tokenizer: Any

    @property
    def mixers(self) -> list[str] | None:
        """Mixer of each layer of a GenLM decoder, such as gru; None: another architecture."""
        return getattr(self.module.config, "mixer_types", None)

    @property
    def start_ids(self) -> list[int]:
        """Token before every text: begin of text, else end of text, else none."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [token for token in known if token is not None][:1]

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end a generated text."""
        ends = self.module.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends} - {None}

    @property
    def context(self) -> int | None:
        """Context length in tokens; None if the config states none."""
        return getattr(self.module.config, "max_position_embeddings", None)

    @property
    def is_recurrent(self) -> bool:
        """True if the model's only memory is a state of constant size."""
        return bool(getattr(self.module.config, "is_recurrent", False))

    @property
    def max_tokens(self) -> int:
        """Longest sequence of the demo, start token included."""
        is_bounded = self.mixers is None or self.module.config.position_type == "learned"
        limit = 2 * MAX_PROMPT_TOKENS
        return min(limit, self.context) if is_bounded and self.context else limit

    @property
    def n_parameters(self) -> int:
        """Number of parameters; tied weights count once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the words of special tokens in it are plain text, as in training."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(text, **options).input_ids

    def tensor(self, ids: list[int]) -> torch.Tensor:
        """Token ids as a batch (1, T) on the model's device."""
        return torch.tensor([ids], dtype=torch.long, device=self.module.device)


def load_models(folder: Path) -> list[LanguageModel]:
    """Load the models of `space.json`, from subfolders of `folder` or from the Hub at the commit named there.

    Nothing that lies beside weights is executed: the classes of a GenLM are those of `genlm/` in `folder`,
    and weights are read only from safetensors, which cannot contain code.
    """
    if (folder / "genlm").is_dir():
        importlib.import_module("genlm")  # registers the Auto classes
    models = []
    for entry in json.loads((folder / "space.json").read_text(encoding="utf-8"))["models"]:
        path = folder / entry["source"]
        source = str(path) if entry["revision"] is None else entry["source"]
        module: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=entry["revision"],
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",  # fused attention does not return its weights
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=entry["revision"], config=module.config, trust_remote_code=False
        )
        models.append(LanguageModel(entry["name"], module.to(device).eval(), tokenizer))
    return models


@dataclass(frozen=True)
class Span:
    """A minimal run of tokens [first, stop) that holds whole characters, and their text."""

    text: str
    first: int
    stop: int


class SpanDecoder:
    """Incremental decoder: the texts of its spans, concatenated, are the decoded text.

    Byte-level tokenizers (such as GPT-2's) split between bytes, so a token may end within a character. Bytes
    that are not UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_byte_level = isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)
        self._added = tokenizer.added_tokens_decoder
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._first = 0  # first token of the open span
        self._text = ""  # of the open span

    def decode(self, ids: Iterable[int]) -> Iterator[Span]:
        """Append tokens and yield the spans that they complete."""
        for token in ids:
            self._ids.append(token)
            if self._is_byte_level:
                self._text += self._decoder.decode(self.bytes_of(token) or b"")
                is_complete = not self._decoder.getstate()[0]  # no bytes of an unfinished character are left
            else:
                start = max(0, self._first - _CONTEXT_TOKENS)
                context = self._decode_text(self._ids[start : self._first])
                self._text = self._decode_text(self._ids[start:])[len(context) :]
                n_open = len(self._ids) - self._first
                is_complete = not self._text.endswith("\ufffd") or n_open >= _MAX_CHARACTER_TOKENS
            if is_complete:
                yield self._close()

    def finish(self) -> Iterator[Span]:
        """Yield the open span, if any."""
        self._text += self._decoder.decode(b"", final=True)
        if self._first < len(self._ids):
            yield self._close()

    def bytes_of(self, token: int) -> bytes | None:
        """Bytes of an added token or a token of a byte-level tokenizer; None for any other token."""
        if token in self._added:
            return self._added[token].content.encode("utf-8")
        if not self._is_byte_level:
            return None
        characters = self._tokenizer.convert_ids_to_tokens(token) or ""  # None: an id beyond the vocabulary
        return bytes(_BYTE_OF_CHARACTER[character] for character in characters)

    def _decode_text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _close(self) -> Span:
        span = Span(self._text, self._first, len(self._ids))
        self._first, self._text = span.stop, ""
        return span


def decode_spans(tokenizer: Any, ids: list[int]) -> list[Span]:
    """All spans of a complete text."""
    decoder = SpanDecoder(tokenizer)
    return [*decoder.decode(ids), *decoder.finish()]
