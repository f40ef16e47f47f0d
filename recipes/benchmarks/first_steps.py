"""Loss in the first tenth of short runs from bigrams, and bits per byte at their end.

    OMP_NUM_THREADS=1 python recipes/benchmarks/first_steps.py TEXT --validation FILE --steps 20,60,200,500 \\
        --decoders gated_linear,lstm,transformer,hybrid --seeds 2 [--seconds 1] [--set KEY=VALUE ...]

After each step of the first tenth, 64 rows that are spread over the held-out text are scored: `rise` is the
most that the loss is then above the loss of the start, `tenth` the difference at the end of the tenth. The
clock of `--seconds` stands still meanwhile. The model has one layer of width 96 (a hybrid as many as it has
kinds of them); its trainer is that of `hf-genlm train`. A way that the package went before is measured by
this script at the commit before.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from hf_genlm.config.recipe import load_recipe
from hf_genlm.config.settings import Facts
from hf_genlm.config.settle import settle
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.model import DECODERS
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents
from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.text.tokenizer import train_tokenizer
from hf_genlm.training.bigram_init import MAX_COUNTED_TOKENS, init_from_bigrams
from hf_genlm.training.budget import Budget
from hf_genlm.training.build import new_model
from hf_genlm.training.callbacks import BudgetCallback
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.trainer import BudgetTrainer, training_arguments_of

N_ROWS, ROWS_AT_ONCE = 64, 16
MAX_TOKENS = 32_768  # that are scored at the end of a run
SHAPE = ("model.hidden_size=96", "training.max_seq_length=64", "training.batch_size=16")


class FirstLosses(TrainerCallback):
    """Scores held-out rows before the first step, and after each of the first tenth of the run."""

    def __init__(self, rows: PackedRows, budget: Budget):
        chosen = [i * len(rows) // N_ROWS for i in range(N_ROWS)]
        parts = [chosen[i : i + ROWS_AT_ONCE] for i in range(0, N_ROWS, ROWS_AT_ONCE)]
        self.batches, self.budget = [collate(rows.__getitems__(part)) for part in parts], budget
        self.losses: list[float] = []
        self.spent_s = 0.0  # for scoring

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._score(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.budget.progress(state.global_step) <= 0.1 or len(self.losses) == 1:
            self._score(model)

    @torch.no_grad()
    def _score(self, model) -> None:
        began = time.monotonic()
        model.eval()
        losses = [model(**b, use_cache=False, skip_logits=True).loss.item() for b in self.batches]
        model.train()
        self.losses.append(statistics.mean(losses))
        self.spent_s += time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="TEXT", help="nothing: the source that Python brings")
    parser.add_argument("--validation", metavar="FILE", help="hold out this, instead of splitting")
    parser.add_argument("--steps", default="20,60,200,500")
    parser.add_argument("--seconds", type=float, help="one run of so many seconds, in place of --steps")
    parser.add_argument("--decoders", default="gated_linear,lstm,transformer,hybrid")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    recipe = load_recipe()
    recipe.corpus.sources = options.sources
    recipe.corpus.validation = [options.validation] if options.validation else []
    corpus = read_corpus(recipe.corpus)
    tokenizer = train_tokenizer(corpus.train, recipe.tokenizer, corpus.report["train"]["bytes"])
    documents = tuple(encode_documents(tokenizer, part) for part in (corpus.train, corpus.validation))
    print("| decoder | steps | start | rise | tenth | bits per byte |\n|---|---|---|---|---|---|")
    for decoder in options.decoders.split(","):
        for length in [None] if options.seconds else options.steps.split(","):
            ways = [*SHAPE, f"model.decoder={decoder}", *options.set]
            ways.append(f"model.num_hidden_layers={len(DECODERS[decoder])}")
            ways.append(f"training.steps={length or 10**6}")
            found = [
                train(tokenizer, documents, ways, options.seconds, seed) for seed in range(options.seeds)
            ]
            losses = [losses for losses, _, _ in found]
            rise = max(max(curve) - curve[0] for curve in losses)
            tenth = statistics.mean(curve[-1] - curve[0] for curve in losses)
            bits = statistics.mean(bits for _, bits, _ in found)
            start = statistics.mean(curve[0] for curve in losses)
            print(
                f"| {decoder} | {found[0][2]} | {start:.3f} | {rise:+.3f} | {tenth:+.3f} | {bits:.4f} |",
                flush=True,
            )


def train(
    tokenizer: PreTrainedTokenizerFast,
    documents: tuple[TokenizedDocuments, TokenizedDocuments],
    ways: list[str],
    seconds: float | None,
    seed: int,
) -> tuple[list[float], float, int]:
    """(held-out losses of the first tenth, bits per byte at the end, steps) of one run."""
    recipe, (to_train, held_out) = load_recipe(None, [*ways, f"training.seed={seed}"]), documents
    settings = settle(recipe, Facts(vocab_size=len(tokenizer), train_tokens=to_train.n_tokens))
    training, ends = settings.training, (tokenizer.eos_token_id, tokenizer.pad_token_id)
    rows = PackedRows(to_train, training.max_seq_length, *ends)
    torch.manual_seed(seed)
    model = new_model(settings, tokenizer)
    init_from_bigrams(model, rows.first_tokens(MAX_COUNTED_TOKENS), keep_embedding=False)
    budget = Budget(settings.length.max_steps, seconds)
    first = FirstLosses(PackedRows(held_out, training.max_seq_length, *ends), budget)
    budget.clock = lambda: time.monotonic() - first.spent_s
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        trainer = BudgetTrainer(
            run=run, budget=budget, recipe=training, model=model, train_dataset=rows, data_collator=collate,
            args=training_arguments_of(run, training, budget, settings.architecture.hidden_size),
            optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": training}),
            callbacks=[BudgetCallback(budget), first],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    found = measure_likelihood(
        model.eval(), held_out, start_id=tokenizer.bos_token_id, batch_size=32, max_tokens=MAX_TOKENS,
        context=settings.evaluation.context_length, stride=settings.evaluation.stride,
    )  # fmt: skip
    (bits,) = [m.value for m in found if m.name == "bits_per_byte"]
    return first.losses, bits, trainer.state.global_step


if __name__ == "__main__":
    main()
