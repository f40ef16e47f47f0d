"""Rows that begin with the state in which the row before ended, against rows that begin with none.

    python recipes/benchmarks/carried_state.py [SOURCE ...] [--validation FILE] --out DIR

Trains each decoder with each length of rows both ways, for equal steps on the same text. Bits per byte are
those of the whole validation text both times: each token given all before it in its document, by carried
states, and given a window of 256 tokens that slides by half of itself; with the time of the first in parts of
the second, the median of interleaved rounds.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

ROUNDS = 3
CONTEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="nothing: the source that Python brings")
    parser.add_argument("--validation", metavar="FILE", help="hold out this, instead of splitting")
    parser.add_argument("--decoders", default="lstm,gated_linear")
    parser.add_argument("--rows", default="32,64", help="lengths of rows, in tokens")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all runs"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print("| decoder | row, tokens | state | bits per byte, carried | by windows | time, carried / windows |")
    print("|---|---|---|---|---|---|", flush=True)
    ways = itertools.product(options.decoders.split(","), options.rows.split(","), ("none", "carried"))
    for decoder, max_seq_length, state in ways:
        runs = [_run(options, decoder, max_seq_length, state, seed) for seed in range(options.seeds)]
        carried, windows, ratio = (statistics.mean(values) for values in zip(*runs, strict=True))
        of_each = " ".join(f"{run[0]:.4f}" for run in runs)
        bits = f"{carried:.4f} ({of_each}) | {windows:.4f}"
        print(f"| `{decoder}` | {max_seq_length} | {state} | {bits} | {ratio:.2f} |", flush=True)


def _run(
    options: argparse.Namespace, decoder: str, max_seq_length: str, state: str, seed: int
) -> tuple[float, float, float]:
    """Bits per byte by carried states and by windows, and the first one's time in parts of the second's."""
    from transformers import AutoTokenizer

    from hf_genlm.config.recipe import load_recipe
    from hf_genlm.evaluation.likelihood import measure_likelihood
    from hf_genlm.model import GenLMForCausalLM
    from hf_genlm.text.corpus import read_corpus
    from hf_genlm.text.encoding import encode_documents
    from hf_genlm.training.train import train

    settings = ["model.hidden_size=96", "model.num_hidden_layers=1", "training.batch_size=16",
                f"model.decoder={decoder}", f"training.max_seq_length={max_seq_length}",
                f"training.carry_state={str(state == 'carried').lower()}", f"training.seed={seed}",
                f"training.steps={options.steps}", "training.num_validations=0", "training.num_samples=0",
                *options.set]  # fmt: skip
    recipe = load_recipe(None, settings)
    recipe.corpus.sources = options.sources
    recipe.corpus.validation = [options.validation] if options.validation else []
    run = train(recipe, options.out / f"{decoder}-{max_seq_length}-{state}-{seed}")
    model = GenLMForCausalLM.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    documents = encode_documents(tokenizer, read_corpus(recipe.corpus).validation)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    bits = {}
    for _, carry_state in itertools.product(range(ROUNDS), (True, False)):
        began = time.perf_counter()
        found = measure_likelihood(
            model, documents, start_id=tokenizer.bos_token_id, context=CONTEXT, carry_state=carry_state
        )
        seconds[carry_state].append(time.perf_counter() - began)
        bits[carry_state] = next(m.value for m in found if m.name == "bits_per_byte")
    return bits[True], bits[False], statistics.median(seconds[True]) / statistics.median(seconds[False])


if __name__ == "__main__":
    main()
