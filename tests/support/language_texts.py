"""Helpers shared by tests: language texts."""

import numpy as np

from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

SENTENCES = {
    "eng": "all human beings are born free and equal in dignity and rights they have reason",
    "rus": "все люди рождаются свободными и равными в своем достоинстве и правах они наделены",
    "hin": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है",
}


WORDS = {code: sentence.split() for code, sentence in SENTENCES.items()}


SMALL = [
    "tokenizer.vocab_size=300",
    "model.decoder=gru",
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.bigram_size=0",
    "training.max_seq_length=16",
    "training.batch_size=8",
    "training.steps=24",
    "training.save_steps=5",
    "training.num_validations=0",
    "training.num_samples=0",
    "corpus.validation_fraction=0.2",
]


def lines_of(code: str, n: int, seed: int = 0) -> str:
    draw = np.random.default_rng((seed, *map(ord, code)))
    return "".join(" ".join(draw.choice(WORDS[code], 6)) + "\n" for _ in range(n))


def trained_on(texts: list[str], vocab_size: int = 300):
    documents = [Document(text, "text") for text in texts]
    return train_tokenizer(documents, TokenizerRecipe(vocab_size=vocab_size), 1000)
