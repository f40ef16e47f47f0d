"""What text costs that is made to be slow: scrubbing, the search for near-duplicates, training a tokenizer.

    python recipes/benchmarks/hostile_text.py

Processor seconds of one core for each MiB; phone numbers on 128 KiB.
"""

import random
import time
from collections.abc import Callable
from typing import Any

from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.text.duplicates import find_near_duplicates
from hf_genlm.text.encoding import Encoder
from hf_genlm.text.scrubbing import Scrubber
from hf_genlm.text.store import Document, as_documents
from hf_genlm.text.tokenizer import train_tokenizer

TEXTS = {
    "secret": ["-eyJ", "//:_authToken= ", "sk-T3BlbkFJ", "-----BEGIN PRIVATE KEY-----", "AC" + "a" * 32],
    "email": ["a'", "a" * 127 + " @a.bc "],
    "phone": ["1", "2 1 ", "1/1/1 ", "1 - "],
}


def measure(name: str, run: Callable[[], Any], n_bytes: int) -> None:
    begun = time.process_time()
    run()
    seconds = (time.process_time() - begun) * 2**20 / n_bytes
    print(f"| {name} | {n_bytes / 2**20:.2f} | {seconds:.2f} |", flush=True)


def main() -> None:
    print("| what | MiB | s a MiB |\n|---|---|---|")
    for kind, units in TEXTS.items():
        scrubber = Scrubber(CorpusRecipe(scrub=[kind], phone_regions=["DE"] if kind == "phone" else []))
        scrubber.scrub("a@b.org +49 30 901820")  # imports and tables
        n = 1 << (17 if kind == "phone" else 20)
        for unit in units:
            text = unit * (n // len(unit))
            name = f"{kind}: `{unit if len(unit) < 30 else unit[:12] + '...'}` repeated"
            measure(name, lambda s=scrubber, t=text: s.scrub(t), len(text))
    generator = random.Random(0)
    words = [f"word{i}" for i in range(20_000)]
    for n in (200, 800):
        same = generator.choices(words, k=2000)
        texts = [" ".join([*same, *generator.choices(words, k=333)]) for _ in range(n)]
        documents = as_documents([Document(text, "here") for text in texts])
        measure(
            f"near-duplicates at 0.8: {n} documents that share 0.75",
            lambda d=documents: find_near_duplicates(d, d[:0], 0.8),
            int(documents.n_bytes.sum()),
        )
    for n in (100_000, 1_000_000):
        for letters in ("a", "abcdefghij"):
            text = "".join(generator.choices(letters, k=n))
            measure(f"a tokenizer of one word of {n:,} letters ({letters})", lambda t=text: encoder_of(t), n)


def encoder_of(text: str) -> Encoder:
    tokenizer = train_tokenizer([Document(text, "here")], TokenizerRecipe(), 0)
    return Encoder(tokenizer.backend_tokenizer, 10**9)


if __name__ == "__main__":
    main()
