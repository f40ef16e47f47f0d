"""What near-copies in the training text do to a model, and what leaving them out does.

    python recipes/benchmarks/near_duplicates.py --steps 300 --seeds 3 --out RESULTS [SOURCE ...]

Passages are planted among other documents of the sources, each in 1, 4, 16 or 64 copies that differ in
one word of forty. A model is trained on the text with its copies, another on what
`corpus.near_duplicates` leaves of it, for the same steps. Then each passage is asked for: after 32
tokens of it the model writes 32, the likeliest one each time. `extracted` is the share of such places
where it writes the text itself; `bits a byte` is the mean loss on the passages.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

COPIES = (1, 4, 16, 64)
PASSAGES = 8  # for each number of copies
OTHERS = 900  # documents that stand once
WORDS = 90  # of a passage
CHANGED = 40  # one word of so many is another in a copy
PREFIX = CONTINUATION = 32  # tokens
THRESHOLD = 0.6
SETTINGS = ["model.hidden_size=96", "model.num_hidden_layers=2", "model.decoder=transformer",
            "training.num_samples=0", "tokenizer.vocab_size=1024", "training.max_seq_length=128",
            "training.batch_size=8", "training.num_validations=0", "training.save_steps=0"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        folder = options.out / f"seed{seed}"
        passages = plant(options.sources, folder, seed)
        for way, settings in (("with copies", []), ("without", [f"corpus.near_duplicates={THRESHOLD}"])):
            run, seconds = train_on(folder, way, seed, options.steps, settings)
            print(
                f"seed {seed}, {way}: read and trained in {seconds:.0f} s, {removed_of(run)} removed",
                flush=True,
            )
            for copies, measured in measure(run, passages).items():
                found.setdefault((way, copies), []).append(measured)
    print("| copies | extracted, with copies | without | bits a byte, with copies | without |")
    print("|---|---|---|---|---|")
    for copies in COPIES:
        cells = [
            spread([pair[i] for pair in found[way, copies]])
            for i in (0, 1)
            for way in ("with copies", "without")
        ]
        print(f"| {copies} | {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    """Mean, and least to most."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def plant(sources: list[str], folder: Path, seed: int) -> dict[int, list[str]]:
    """Write the text to train on and one to measure, and give the passages by how many copies each has."""
    from hf_genlm.config.recipe import CorpusRecipe
    from hf_genlm.text.corpus import read_documents

    generator = random.Random(seed)
    words = [
        word for document in read_documents(sources, CorpusRecipe())[0] for word in document.text.split()
    ]
    pieces = [words[i : i + WORDS] for i in range(0, len(words) - WORDS, WORDS)]
    generator.shuffle(pieces)
    passages = {n: [pieces.pop() for _ in range(PASSAGES)] for n in COPIES}
    held, others = pieces[:50], pieces[50 : 50 + OTHERS]
    texts = [*others, *(changed(passage, words, generator) for n, each in passages.items() for passage in each
                        for _ in range(n))]  # fmt: skip
    generator.shuffle(texts)
    folder.mkdir(parents=True)
    for name, documents in (("train", texts), ("validation", held)):
        lines = (json.dumps({"text": " ".join(text)}) + "\n" for text in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {n: [" ".join(passage) for passage in each] for n, each in passages.items()}


def changed(passage: list[str], words: list[str], generator: random.Random) -> list[str]:
    """With another word at one place of `CHANGED`, which are others in every copy."""
    places = set(generator.sample(range(len(passage)), len(passage) // CHANGED))
    return [generator.choice(words) if i in places else word for i, word in enumerate(passage)]


def train_on(folder: Path, way: str, seed: int, steps: int, settings: list[str]):
    """The run folder, and the seconds of reading and training."""
    from hf_genlm.config.recipe import load_recipe
    from hf_genlm.training.train import train

    recipe = load_recipe(None, [*SETTINGS, *settings, f"training.steps={steps}", f"training.seed={seed}"])
    recipe.corpus.sources = [str(folder / "train.jsonl")]
    recipe.corpus.validation = [str(folder / "validation.jsonl")]
    begun = time.monotonic()
    return train(recipe, folder / way.replace(" ", "-")), time.monotonic() - begun


def removed_of(run) -> int:
    report = json.loads(run.corpus.read_text(encoding="utf-8"))
    return report.get("near_duplicates", {"removed": 0})["removed"]


def measure(run, passages: dict[int, list[str]]) -> dict[int, tuple[float, float]]:
    """(share of places that are extracted, bits per byte) by number of copies."""
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_genlm  # noqa: F401  (registers the model)

    model = AutoModelForCausalLM.from_pretrained(run.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    measured = {}
    for copies, texts in passages.items():
        places, nats, n_bytes = [], 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            starts = range(0, ids.shape[1] - PREFIX - CONTINUATION + 1, CONTINUATION)
            prefixes = torch.cat([ids[:, start : start + PREFIX] for start in starts])
            written = model.generate(
                prefixes,
                attention_mask=torch.ones_like(prefixes),
                do_sample=False,
                min_new_tokens=CONTINUATION,
                max_new_tokens=CONTINUATION,
                pad_token_id=tokenizer.pad_token_id,
            )[:, PREFIX:]
            wanted = torch.cat([ids[:, start + PREFIX : start + PREFIX + CONTINUATION] for start in starts])
            places += (written == wanted).all(dim=1).tolist()
            for part in ids.split(tokenizer.model_max_length - 1, dim=1):
                row = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), part], dim=1)
                with torch.no_grad():
                    nats += float(model(row, labels=row).loss) * part.shape[1]
            n_bytes += len(text.encode())
        measured[copies] = statistics.mean(places), nats / math.log(2) / n_bytes
    return measured


if __name__ == "__main__":
    main()
