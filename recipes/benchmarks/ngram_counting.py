"""Counting of n-grams: MB of text a second, bits per byte of every order, and the peak memory.

    python recipes/benchmarks/ngram_counting.py [TEXT ...] [--validation TEXT]
    python recipes/benchmarks/ngram_counting.py --memory-tokens 8388608 [--order 6] [--max-entries 4000000]

TEXT is what `hf-genlm train` takes; without one, what CPython brings. The seconds are of a processor, so that
other work on the machine counts less. Bits per byte are of the validation text, that of the split if none is
named. The memory is that of counting independent random tokens of Zipf's frequencies, in a fresh process: few
of their n-grams repeat, so that real text needs less.
"""

import argparse
import resource
import statistics
import time

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.tokenizer import train_tokenizer
from hf_genlm.training.counting import MAX_ORDER, choose_order, count_ngrams, log_probabilities, stream_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="*")
    parser.add_argument("--validation", nargs="*", default=[])
    parser.add_argument("--vocab-size", type=int, help="by the size of the text if it is not given")
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-tokens", type=int)
    parser.add_argument("--max-entries", type=int)
    options = parser.parse_args()
    if options.memory_tokens:
        measure_memory(options)
    else:
        measure_text(options)


def measure_text(options: argparse.Namespace) -> None:
    """Print the rate of counting and of the choice of the order, and bits per byte of each order."""
    corpus = read_corpus(CorpusRecipe(sources=options.text, validation=options.validation))
    n_bytes, n_held_out = (corpus.report[split]["bytes"] for split in ("train", "validation"))
    tokenizer = train_tokenizer(corpus.train, TokenizerRecipe(vocab_size=options.vocab_size), n_bytes)
    size, start_id = len(tokenizer), tokenizer.eos_token_id
    text, held_out = (
        stream_of(encode_documents(tokenizer, documents), start_id)
        for documents in (corpus.train, corpus.validation)
    )
    seconds = []
    for _ in range(options.rounds):
        begin = time.process_time()
        table = count_ngrams(text, options.order, size, start_id, options.max_entries)
        seconds.append(time.process_time() - begin)
    taken, rows = statistics.median(seconds), [f"{len(counts):,}" for counts in table.counts]
    print(f"{n_bytes:,} bytes, {len(text):,} tokens ({n_bytes / len(text):.2f} bytes each), {size:,} in all")
    print(f"order {options.order}: {taken:.2f} s, {n_bytes / 1e6 / taken:.1f} MB/s; rows:", *rows)
    begin = time.process_time()
    chosen = choose_order(text, size, start_id)
    print(f"order {chosen} is chosen in {time.process_time() - begin:.2f} s")
    bits = -log_probabilities(text, held_out, size, start_id, MAX_ORDER).sum(1) / np.log(2)
    print(f"bits per byte of orders 1 to {MAX_ORDER} on {n_held_out:,} bytes:",
          *(f"{each:.4f}" for each in bits / n_held_out))  # fmt: skip


def measure_memory(options: argparse.Namespace) -> None:
    """Print the peak memory of counting random tokens, and that before it."""
    size = options.vocab_size or 16_384
    weights = 1 / np.arange(1, size + 1)
    borders = (np.cumsum(weights) / weights.sum()).astype(np.float32)
    random = np.random.default_rng(0)
    text = np.empty(options.memory_tokens, dtype=np.uint16)
    for part in np.array_split(text, max(1, len(text) >> 20)):
        part[:] = np.minimum(np.searchsorted(borders, random.random(len(part), dtype=np.float32)), size - 1)
    before, begin = peak_mb(), time.process_time()
    chosen = choose_order(text, size, size - 1)
    print(f"order {chosen} is chosen in {time.process_time() - begin:.1f} s, peak {peak_mb():,.0f} MB")
    begin = time.process_time()
    table = count_ngrams(text, options.order, size, size - 1, options.max_entries)
    taken, rows = time.process_time() - begin, [f"{len(counts):,}" for counts in table.counts]
    print(f"{len(text):,} tokens of {size:,}, order {options.order}: {taken:.1f} s, rows:", *rows)
    print(f"peak {peak_mb():,.0f} MB, {before:,.0f} MB of them before counting")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux


if __name__ == "__main__":
    main()
