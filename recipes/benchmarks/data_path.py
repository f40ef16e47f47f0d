"""The data path: run_clm's way and ours side by side, and the memory that ours takes.

    python recipes/benchmarks/data_path.py [TEXT ...]       MB/s of both ways, interleaved, and their ratio
    python recipes/benchmarks/data_path.py --memory-mb 1000 peak memory of a whole run (on Linux)

TEXT is what `hf-genlm train` takes; without one, what CPython brings. run_clm's way is that of transformers'
examples/pytorch/language-modeling/run_clm.py: two `datasets.map` calls, the tokenizer over batches of 1,000
records and then `group_texts`, with records that are lines (as its `text` loader makes them) or documents.
Both ways start from text that was read and end with packed rows.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROW_LENGTH = 256
TRAIN_OPTIONS = ["--steps", "2", "--set", "training.num_validations=0", "--set", "training.num_samples=0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--max-mb", type=float, default=6.0, help="of the text given; run_clm's way is slow")
    parser.add_argument("--memory-mb", type=int, help="make a text of so many MB and print the peak memory")
    parser.add_argument("--records", action="store_true", help="with --memory-mb: a .jsonl of short records")
    parser.add_argument("--chinese", action="store_true", help="with --memory-mb: phrases of Han characters")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # the fresh process
    options = parser.parse_args()
    if options.train:
        train_and_report(options.train)
    elif options.memory_mb:
        measure_memory(options.memory_mb, options.records, options.chinese)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Print the rate of each way and how many times faster ours is."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
    from hf_genlm.text.corpus import read_documents
    from hf_genlm.text.tokenizer import train_tokenizer

    documents, _ = read_documents(options.text, CorpusRecipe())
    tokenizer = train_tokenizer(
        documents, TokenizerRecipe(vocab_size=options.vocab_size), int(documents.n_bytes.sum())
    )
    passed = documents.n_bytes.cumsum()
    documents = documents[: max(1, int((passed <= options.max_mb * 1e6).sum()))]
    texts = [document.text for document in documents]
    lines = [line for text in texts for line in text.splitlines()]
    n_bytes = int(documents.n_bytes.sum())
    ways = {
        "run_clm, lines": lambda: run_clm(tokenizer, lines),
        "run_clm, documents": lambda: run_clm(tokenizer, texts),
        "ours": lambda: ours(tokenizer, documents),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    n_same = count_same(tokenizer, documents, texts)
    print(f"{n_bytes:,} bytes, {len(texts):,} documents, vocabulary {len(tokenizer):,}, medians of "
          f"{options.rounds} interleaved rounds")  # fmt: skip
    print(f"ids as the saved tokenizer gives them: {n_same:,} of {len(texts):,} documents")
    for name, taken in seconds.items():
        ratios = [other / own for other, own in zip(taken, seconds["ours"], strict=True)]
        print(f"{name:<20} {n_bytes / statistics.median(taken) / 1e6:7.2f} MB/s   ours is "
              f"{statistics.median(ratios):6.2f} times as fast ({min(ratios):.2f} to "
              f"{max(ratios):.2f})")  # fmt: skip


def run_clm(tokenizer, records: list[str]) -> None:
    """As run_clm.py does it: tokenize, then join and cut into blocks."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": records})

    def group_texts(examples):
        joined = {key: list(itertools.chain(*examples[key])) for key in examples}
        length = (len(joined["input_ids"]) // ROW_LENGTH) * ROW_LENGTH
        result = {
            key: [values[i : i + ROW_LENGTH] for i in range(0, length, ROW_LENGTH)]
            for key, values in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    with tempfile.TemporaryDirectory() as folder:
        tokenized = data.map(
            lambda examples: tokenizer(examples["text"]),
            batched=True,
            remove_columns=["text"],
            cache_file_name=f"{folder}/tokenized.arrow",
        )
        tokenized.map(group_texts, batched=True, cache_file_name=f"{folder}/grouped.arrow")


def ours(tokenizer, documents) -> None:
    """As `hf-genlm train` does it, without a cache."""
    from hf_genlm.text.encoding import encode_documents
    from hf_genlm.text.packing import PackedRows

    PackedRows(
        encode_documents(tokenizer, documents), ROW_LENGTH, tokenizer.eos_token_id, tokenizer.pad_token_id
    )


def count_same(tokenizer, documents, texts: list[str]) -> int:
    """Documents whose ids are those of the saved tokenizer, to which the words of special tokens are text."""
    from transformers import AutoTokenizer

    from hf_genlm.text.encoding import encode_documents

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = AutoTokenizer.from_pretrained(folder)
    wanted = saved(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found = encode_documents(tokenizer, documents)
    return sum(ids.tolist() == other for (ids, _), other in zip(found, wanted, strict=True))


def measure_memory(megabytes: int, records: bool, chinese: bool) -> None:
    """Make a text, train on it in a fresh process, and print that one's figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.jsonl" if records else "text.txt")
        n_records = (write_chinese if chinese else write_text)(path, megabytes * 10**6, records)
        kind = f"{n_records:,} records" if records else "one file"
        print(f"{path.stat().st_size:,} bytes, {kind}", flush=True)
        environment = os.environ | {"HF_GENLM_CACHE": f"{folder}/cache"}
        for name in ("first run", "second run"):
            arguments = [str(path), "--out", f"{folder}/{name.split()[0]}", *TRAIN_OPTIONS]
            done = subprocess.run(
                [sys.executable, __file__, "--train", *arguments],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            print(f"{name}: {done.stdout.splitlines()[-1]}", flush=True)


def train_and_report(arguments: list[str]) -> None:
    """In the fresh process: a whole run, and what it took. The last line holds the figures."""
    from hf_genlm.cli.main import main as cli

    cut_short()
    start = time.perf_counter()
    if code := cli(["train", *arguments]):
        sys.exit(code)
    seconds = time.perf_counter() - start
    log = Path(arguments[arguments.index("--out") + 1], "log.jsonl").read_text().splitlines()
    at = {event["event"]: event["time"] for event in map(json.loads, log)}
    # getrusage would count what the parent of this process had before it
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    print(f"peak memory {peak / 1e6:,.0f} MB; read and split {at['corpus'] - at['started']:.1f} s, "
          f"tokenizer and ids {at['tokenized'] - at['corpus']:.1f} s, whole {seconds:.1f} s")  # fmt: skip


def cut_short() -> None:
    """Leave out the exact evaluation, whose time is that of the model: it reads the same file of ids."""
    from hf_genlm.training import train

    whole = train.likelihood_of

    def a_part(model, corpus, recipe, max_tokens=None, **listeners):
        return whole(model, corpus, recipe, 20_000, **listeners)

    train.likelihood_of = a_part


def write_text(path: Path, n_bytes: int, records: bool) -> int:
    """CPython's own text, its letters permuted anew in every round. Returns the number of records."""
    import random

    from hf_genlm.config.recipe import CorpusRecipe
    from hf_genlm.text.corpus import read_documents

    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [document.text for document in read_documents([], CorpusRecipe())[0]]
    written = n_records = 0
    with path.open("w", encoding="utf-8") as file:
        while True:
            mixed = "".join(generator.sample(letters, len(letters)))
            table = str.maketrans(letters + letters.upper(), mixed + mixed.upper())
            for text in texts:
                changed = text.translate(table)
                parts = (
                    [changed[i : i + 1000] for i in range(0, len(changed), 1000)] if records else [changed]
                )
                for part in parts:
                    line = json.dumps({"text": part}, ensure_ascii=False) + "\n" if records else part
                    file.write(line)
                    written += len(line.encode())
                    n_records += 1
                if written >= n_bytes:
                    return n_records


def write_chinese(path: Path, n_bytes: int, records: bool) -> int:
    """Phrases of 4 to 14 characters of Zipf's frequencies; a line end after every twentieth, for `records` a
    record."""
    import random

    generator = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(4000)]
    weights = [1 / (i + 3) for i in range(4000)]
    written = n_records = 0
    with path.open("w", encoding="utf-8") as file:
        while written < n_bytes:
            drawn, start = generator.choices(characters, weights, k=20_000), 0
            while start < len(drawn):
                stop = start + generator.randint(4, 14)
                phrase, start = "".join(drawn[start:stop]), stop
                text = phrase + generator.choice("\uff0c\uff0c。")
                line = "\n" if generator.random() < 0.05 else ""
                text = json.dumps({"text": text}, ensure_ascii=False) + "\n" if records else text + line
                file.write(text)
                written += len(text.encode())
                n_records += 1
    return n_records if records else 1


if __name__ == "__main__":
    main()
