"""Loading the models that `space.json` names, and what the demo must know of each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST_TOKENS = 1024  # of a prompt that are read, the last ones; with what is written twice as many at most
MOST_CHARACTERS = 20_000  # of anything typed, before any work is done on it


@dataclass(frozen=True)
class LanguageModel:
    """A causal model with its tokenizer."""

    name: str
    module: Any
    tokenizer: Any

    @property
    def mixers(self) -> list[str] | None:
        """The word of each layer of a GenLM decoder, as gru or full_attention; None: another architecture."""
        return getattr(self.module.config, "mixer_types", None)

    @property
    def start_ids(self) -> list[int]:
        """What stands before every text: begin or else end of text; nothing where there is neither."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [token for token in known if token is not None][:1]

    @property
    def end_ids(self) -> set[int]:
        """Tokens after which nothing is written."""
        ends = self.module.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends} - {None}

    @property
    def context(self) -> int | None:
        """Tokens that it was made to look back on; None: it does not say."""
        return getattr(self.module.config, "max_position_embeddings", None)

    @property
    def is_recurrent(self) -> bool:
        """True if all that it remembers is a state of one size, after any number of tokens."""
        return bool(getattr(self.module.config, "is_recurrent", False))

    @property
    def most_tokens(self) -> int:
        """Tokens, the start token among them, beyond which it cannot go or is not let."""
        has_end = self.mixers is None or self.module.config.position_type == "learned"
        return min(2 * MOST_TOKENS, self.context) if has_end and self.context else 2 * MOST_TOKENS

    @property
    def n_parameters(self) -> int:
        """All of them, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without one at its start."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def tensor(self, ids: list[int]) -> torch.Tensor:
        """(1, T) on the device of the model."""
        return torch.tensor([ids], dtype=torch.long, device=self.module.device)


def load_models(folder: Path) -> list[LanguageModel]:
    """The models of `space.json` in `folder`, by their folders in it or their ids on the Hub."""
    stated = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    return [_load(folder, **entry) for entry in stated["models"]]


def _load(folder: Path, name: str, source: str, has_own_code: bool) -> LanguageModel:
    """`has_own_code`: its architecture is no part of transformers; its Python files lie beside the weights.

    Loading then executes them. A Space does so with its own model, named here by who made the Space; nothing
    that a visitor types is ever loaded. Weights are read as safetensors alone, which cannot hold code.
    """
    path = folder / source
    place = str(path) if path.is_dir() else source
    module: Any = AutoModelForCausalLM.from_pretrained(
        place,
        trust_remote_code=has_own_code,
        use_safetensors=True,
        attn_implementation="eager",  # fused attention does not keep the weights that are shown here
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(place, config=module.config, trust_remote_code=False)
    return LanguageModel(name, module.to(device).eval(), tokenizer)
