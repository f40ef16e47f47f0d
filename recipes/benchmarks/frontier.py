"""Bits per byte by minutes of training, on several texts: ours, and what a user could run instead.

    python recipes/benchmarks/frontier.py TEXT:HELD_OUT [..] --minutes 0.057 0.25 1 2 --out FOLDER

Ways: `ours`, as `hf-genlm train --minutes` makes it; `network`, ours without counts; `counts`, the best of
Kneser-Ney of orders 3 to 6 over the same tokens, whatever the minutes; `fixed`, `network` and those counts
mixed by one constant weight, the best of nine on the held-out text itself; and, with --peers, `gpt2` and
`llama`: transformers' models in two shapes at two rates each, packed rows of the same tokens, AdamW for the
one and Muon for the other's matrices, each for the same minutes, the best counts. What is finished in FOLDER
is not done again. The machine must be idle: the minutes are its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from peers import build_gpt2, build_llama, packed_batches, train_peer

from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.corpus import TokenizedCorpus, prepare_corpus
from hf_genlm.training.counting import MAX_ORDER, log_probabilities, stream_of
from hf_genlm.training.train import train

SHAPES = ((4, 128, 4), (6, 256, 8))  # layers, width, heads of a peer
RATES = {"gpt2": (1e-3, 2e-3), "llama": (1e-3, 3e-3)}
CONTEXT, ROWS = 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT:HELD_OUT")
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.057, 0.25, 1, 2])
    parser.add_argument("--ways", nargs="+", default=["ours", "network"], choices=["ours", "network"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "frontier.json"
    found: dict[str, Any] = json.loads(saved.read_text()) if saved.is_file() else {}
    for text in options.texts:
        for minutes in options.minutes:
            for seed in range(options.seeds):
                key = f"{Path(text.split(':')[0]).stem} {minutes:g} {seed}"
                values = found.setdefault(key, {})
                for way in options.ways:
                    if way not in values:
                        run = _train(text, minutes, seed, way, options.out / key.replace(" ", "-") / way)
                        values |= _bits_of(run, way)
                if options.peers and "gpt2" not in values:
                    values |= _train_peers(RunFolder(options.out / key.replace(" ", "-") / "ours"), minutes)
                saved.write_text(json.dumps(found, indent=1))
                print(key, {name: round(value, 4) for name, value in values.items()}, flush=True)


def _train(text: str, minutes: float, seed: int, way: str, folder: Path) -> RunFolder:
    source, _, held_out = text.partition(":")
    stated = [f"training.minutes={minutes}", f"training.seed={seed}"]
    recipe = load_recipe(None, [*stated, *(["model.ngram_order=0"] if way == "network" else [])])
    recipe.corpus.sources, recipe.corpus.validation = [source], [held_out]
    return RunFolder(folder) if (folder / "evaluation.json").is_file() else train(recipe, folder)


def _bits_of(run: RunFolder, way: str) -> dict[str, float]:
    """Bits per byte of a run and, without counts in it, of counts beside it."""
    bits = next(m.value for m in read_measurements(run.evaluation) if m.name == "bits_per_byte")
    if way == "ours":
        return {"ours": bits}
    recipe = load_recipe(run.recipe)
    corpus = _corpus_of(run, recipe)
    start_id, vocab_size = corpus.tokenizer.eos_token_id, len(corpus.tokenizer)
    measured = stream_of(corpus.validation, start_id)
    is_scored = measured[1:] != start_id
    counted = log_probabilities(stream_of(corpus.train, start_id), measured, vocab_size, start_id, MAX_ORDER)[
        2:, is_scored
    ]
    best = counted[int(np.argmax(counted.mean(1)))]
    n_bytes = sum(n_bytes for ids, n_bytes in corpus.validation if len(ids))
    network = -_nats_of(run, corpus, recipe)
    mixed = [np.logaddexp(np.log(w) + network, np.log(1 - w) + best).sum() for w in np.arange(1, 10) / 10]
    nats = {"network": network.sum(), "counts": best.sum(), "fixed": max(mixed)}
    return {name: float(-total / np.log(2) / n_bytes) for name, total in nats.items()}


def _nats_of(run: RunFolder, corpus: TokenizedCorpus, recipe: Recipe) -> np.ndarray:
    """Nats of each held-out token, in their order."""
    offsets = np.cumsum([0, *(len(ids) for ids, _ in corpus.validation)])
    nats = np.zeros(offsets[-1])

    def note(windows: Any, scores: np.ndarray) -> None:
        for window, part in zip(
            windows, np.split(scores, np.cumsum([w.stop - w.first for w in windows])[:-1]), strict=True
        ):
            begin = offsets[window.document]
            nats[begin + window.first : begin + window.stop] = part

    evaluation: Any = recipe.evaluation
    measure_likelihood(
        GenLMForCausalLM.from_pretrained(run.model), corpus.validation,
        start_id=corpus.tokenizer.bos_token_id,
        context=evaluation.context_length, stride=evaluation.stride, batch_size=evaluation.batch_size,
        on_scores=note,
    )  # fmt: skip
    return nats


def _corpus_of(run: RunFolder, recipe: Recipe) -> TokenizedCorpus:
    recipe.tokenizer.path = str(run.tokenizer)
    return prepare_corpus(run, recipe)


def _train_peers(run: RunFolder, minutes: float) -> dict[str, float]:
    """Bits per byte of the best GPT-2 and the best Llama after as many minutes."""
    corpus = _corpus_of(run, load_recipe(run.recipe))
    tokenizer, found = corpus.tokenizer, {}
    for kind, build in (("gpt2", build_gpt2), ("llama", build_llama)):
        bits = []
        for shape in SHAPES:
            for rate in RATES[kind]:
                model = build(len(tokenizer), CONTEXT, *shape)
                train_peer(
                    model,
                    packed_batches(corpus, CONTEXT, ROWS),
                    rate,
                    lambda _, s: s / (60 * minutes),
                    uses_muon=kind == "llama",
                )
                measured = measure_likelihood(
                    model, corpus.validation, start_id=tokenizer.bos_token_id, context=CONTEXT, batch_size=32
                )
                bits.append(next(m.value for m in measured if m.name == "bits_per_byte"))
                print(f"  {kind} {shape} {rate:g}: {bits[-1]:.4f}", flush=True)
        found[kind] = min(bits)
    return found


if __name__ == "__main__":
    main()
