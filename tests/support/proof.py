"""Train each kind of run for 30 steps and print hashes of its weights and figures.

    python tests/support/proof.py [--only NAME ...] > FILE

A change of the code that is not to change any result is proved by two such files that are equal: one written
before it, one after, on one machine and with one set of installed packages. Each line is the name of a run
and the first 16 digits of SHA-256 hashes: of the tensors of its model, of its figures, and of its tokenizer.
Bits per byte, and epsilon of a private run, are printed as numbers.

Each run is a call of the command line in a fork of this process, which has imported the libraries. So no run
depends on those before it, and one that is resumed is resumed by another process. Everything is computed on
the CPU by one thread. The table before RUNS holds all names of the package.

Exit codes: 0 done; 1 a run failed, or one that was resumed differs from the one that was not disturbed.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- names of the package

COMMAND = "hf_genlm.cli.main:main"  # takes a list of arguments, returns an exit code
TRAIN, COMPARE, TOKENIZER = "train", "compare", "tokenizer"  # verbs
CACHE_VARIABLE = "HF_GENLM_CACHE"
# word of RUNS -> option of the command line, or recipe field
NAMES = {
    # options
    "out": "--out",
    "resume": "--resume",
    "stream": "--stream",
    "language": "--source",
    "vectors": "--vectors",
    "epsilon": "--epsilon",
    "from": "--from",
    "near_duplicates": "--near-duplicates",
    "scrub": "--scrub",
    "canaries": "--canaries",
    "processes": "--processes",
    "seed": "--seed",
    "steps": "--steps",
    "decoder": "--decoder",
    "decoders": "--decoders",  # of compare
    "seeds": "--seeds",  # of compare
    # recipe fields
    "temperature": "corpus.temperature",
    "shuffle_buffer": "corpus.shuffle_buffer",
    "validation_bytes": "corpus.validation_bytes",
    "weights": "corpus.weights",
    "tokenizer": "tokenizer.path",
    "vocabulary": "tokenizer.vocab_size",
    "hidden": "model.hidden_size",
    "layers": "model.num_hidden_layers",
    "mixers": "model.mixers",
    "heads": "model.num_attention_heads",
    "key_value_heads": "model.num_key_value_heads",
    "window": "model.sliding_window",
    "embedding": "model.embedding_size",
    "tied": "model.tie_word_embeddings",
    "output_bias": "model.output_bias",
    "gated_mlp": "model.gated_mlp",
    "mlp_rank": "model.mlp_rank",
    "shared_layers": "model.shared_layers",
    "pair_rows": "model.bigram_size",
    "softcapping": "model.final_logit_softcapping",
    "dropout": "model.dropout",
    "frozen": "vectors.frozen",
    "release_step": "vectors.unfreeze_step",
    "row_length": "training.max_seq_length",
    "batch": "training.batch_size",
    "accumulation": "training.gradient_accumulation_steps",
    "carry_state": "training.carry_state",
    "start": "training.init",
    "optimizer": "training.optimizer",
    "label_smoothing": "training.label_smoothing_factor",
    "z_loss": "training.z_loss",
    "threads": "training.num_threads",
    "validations": "training.num_validations",
    "samples": "training.num_samples",
    "checkpoint_steps": "training.save_steps",
    "milestones": "training.milestone_words",
    "secure_noise": "privacy.secure_noise",
}
# name on a line -> decoder
DECODERS = {
    "elman": "elman",
    "gru": "gru",
    "lstm": "lstm",
    "gated_linear": "gated_linear",
    "transformer": "transformer",
    "sliding": "sliding",
    "hybrid": "hybrid",
}
DEFAULT, OTHER = DECODERS["gated_linear"], DECODERS["lstm"]  # of runs that need one or two
# within a run folder
WEIGHTS = "model/model.safetensors"
TOKENIZER_FILE = "tokenizer/tokenizer.json"
FIGURES = "evaluation.json"
PRIVACY = "privacy.json"
MILESTONES = "milestones/*/model.safetensors"
# within FIGURES
LIST_OF_FIGURES = "measurements"
FIGURE_FIELDS = ("name", "value", "n", "stderr")
INTERVAL = "interval"  # a field that some figures have besides
BITS = "bits_per_byte"  # the figure that is printed
IS_TIME = re.compile("second|minute|_s$|_ms$")  # names of figures that are left out
EPSILON = "epsilon"  # within PRIVACY
# within the folder of a comparison
RESULTS = "comparison.json"
RUNS_OF_COMPARISON = "runs/*"
# within RESULTS; * is every item of a list
RESULT_FIGURES = (
    "held_out.bytes",
    "held_out.pieces",
    "candidates.*.name",
    "candidates.*.bits_per_byte.value",
    "candidates.*.bits_per_byte.interval",
    "candidates.*.nats_per_token",
    "candidates.*.parameters",
    "candidates.*.training_flops",
    "candidates.*.runs.*.seed",
    "candidates.*.runs.*.bits_per_byte",
    "candidates.*.runs.*.nats_per_token",
    "candidates.*.runs.*.steps",
    "candidates.*.runs.*.tokens",
    "worse_than_best.*.name",
    "worse_than_best.*.value",
    "worse_than_best.*.interval",
    "worse_than_best.*.p_value_holm",
)
RESULT_BITS = "candidates.0.bits_per_byte.value"
# what was renamed since the file that a new one is compared with: name now -> name then
RENAMED_FIGURES: dict[str, str] = {}
RENAMED_TENSORS: list[tuple[str, str]] = []  # regular expressions and what replaces them, in order

# ---------------------------------------------------------------- the runs

STEPS, STOPPED_AFTER = 30, 12
TEXT, SHORT, DIRTY, SMALL, OTHER_LANGUAGE = (
    "text.jsonl",
    "short.jsonl",
    "dirty.jsonl",
    "small.txt",
    "other.txt",
)
VECTORS = "vectors.txt"
OWN_TOKENIZER = "own_tokenizer"  # a folder beside those of the runs

# of every run, unless it says otherwise; None: not stated
SMALL_RUN = {
    "decoder": DEFAULT,
    "steps": STEPS,
    "seed": 3,
    "threads": 1,
    "vocabulary": 320,
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "window": 12,
    "row_length": 32,
    "batch": 4,
    "validations": 1,
    "samples": 1,
}
PRIVATE = {
    "text": [SHORT],
    "needs": OWN_TOKENIZER,
    "tokenizer": OWN_TOKENIZER,
    "vocabulary": None,
    "epsilon": 8,
    "accumulation": 2,
}
WITH_VECTORS = {"vectors": VECTORS}
STREAMED = {"stream": True, "shuffle_buffer": 16, "validation_bytes": 6000}

# name -> what it says; besides words of NAMES: verb, text (sources), needs (a run that must be there),
# resumes (the run that it repeats, stopped on its way)
RUNS: dict[str, dict[str, Any]] = {
    OWN_TOKENIZER: {"verb": TOKENIZER},
    **{name: {"decoder": decoder} for name, decoder in DECODERS.items()},
    "hybrid_of_three": {"decoder": DECODERS["hybrid"], "layers": 3},
    "few_heads": {"decoder": DECODERS["transformer"], "heads": 4, "key_value_heads": 2},
    "gated_mlp": {"decoder": DECODERS["transformer"], "gated_mlp": True},
    "narrow_mlp": {"mlp_rank": 8},
    "shared_layers": {"layers": 4, "shared_layers": 2},
    "no_pairs": {"pair_rows": 0, "start": "random"},
    "pairs": {"pair_rows": 64, "start": "bigrams"},
    "softcapping": {"softcapping": 20},
    "passes": {"text": [SMALL], "batch": 8},
    "accumulation": {"accumulation": 2},
    "carried": {"carry_state": True},
    "carried_lstm": {"carry_state": True, "decoder": OTHER},
    "muon": {"optimizer": "muon"},
    "sgd": {"optimizer": "sgd"},
    "dropout": {"dropout": 0.1},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 0.001},
    "tied": {"tied": True, "start": "random"},
    "narrow": {"embedding": 16},
    "narrow_untied": {"embedding": 16, "tied": False, "output_bias": True},
    "milestones": {"milestones": "250,1K"},
    "canaries": {"canaries": "1,4"},
    "cleaned": {"text": [DIRTY], "near_duplicates": 0.7, "scrub": True},
    "languages": {"text": [], "language": [f"eng={TEXT}", f"deu={OTHER_LANGUAGE}"], "temperature": 4},
    "streamed": STREAMED,
    "streamed_mixed": {**STREAMED, "text": [TEXT, SHORT], "weights": "1,3"},
    "vectors": WITH_VECTORS,
    "frozen": {**WITH_VECTORS, "frozen": True},
    "released": {**WITH_VECTORS, "frozen": True, "release_step": 10},
    "vectors_streamed": {**STREAMED, **WITH_VECTORS},
    "from": {"needs": "gated_linear", "from": "gated_linear", **dict.fromkeys(("decoder", "vocabulary"))},
    "private": PRIVATE,
    "private_secure": {**PRIVATE, "secure_noise": True},
    "resumed": {"resumes": "dropout"},
    "resumed_carried": {"resumes": "carried"},
    "resumed_muon": {"resumes": "muon"},
    "resumed_passes": {"resumes": "passes"},
    "resumed_streamed": {"resumes": "streamed"},
    "resumed_released": {"resumes": "released"},
    "resumed_private": {"resumes": "private"},
    "two_processes": {"processes": 2},
    "compare": {
        "verb": COMPARE,
        "decoders": f"{DEFAULT},{OTHER}",
        "seeds": 2,
        "steps": 12,
        "samples": None,
        **dict.fromkeys(("decoder", "seed")),
    },
}

# ---------------------------------------------------------------- what they read

ENGLISH = (
    "the of and to in that was his with for river had not are but from they which one you were her all "
    "she there would their him been has when who will more if out so said what up its about into than "
    "them can only other new some could time these two may then do first any my now such like our over "
    "man me even most made after also did many before must through years where much your way well down "
    "should because each just those people house world still between water number under light small "
    "evening mountain"
)
GERMAN = (
    "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden "
    "aus er hat daß sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur "
    "oder aber vor zur bis mehr durch man sein wurde sei hatte kann gegen vom können schon wenn habe "
    "seine Mark ihre dann unter wir Jahre zwei Jahren Haus groß Straße Wasser möglich Übung"
)
PERSONAL = (
    "Write to anna.{0}@example.org or call +49 30 1234{0:04d} from 93.184.216.{1}.",
    "The card 4111 1111 1111 1111 paid to DE89 3704 0044 0532 0130 00, with key = 'AKIA{0:016d}'.",
)


def write_texts(folder: Path) -> None:
    """Write all sources; they follow from numbers that no version of Python changes."""
    draw = random.Random(7)
    write_documents(folder / TEXT, [sentences(draw, ENGLISH, 6) for _ in range(320)])
    write_documents(folder / SHORT, [sentences(draw, ENGLISH, 1) for _ in range(1500)])
    write_documents(folder / DIRTY, dirty_documents(draw))
    for name, language, count in ((SMALL, ENGLISH, 120), (OTHER_LANGUAGE, GERMAN, 300)):
        lines = [sentences(draw, language, 1) for _ in range(count)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [" ".join([word, *(f"{draw.random() - 0.5:.4f}" for _ in range(16))]) for word in ENGLISH.split()]
    (folder / VECTORS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentences(draw: random.Random, language: str, count: int) -> str:
    """`count` sentences of the words of `language`, its first words the most frequent."""
    words, found = language.split(), []
    for _ in range(count):
        chosen = [words[int(len(words) * draw.random() ** 2)] for _ in range(3 + int(9 * draw.random()))]
        found.append(f"{' '.join(chosen).capitalize()}.")
    return " ".join(found)


def dirty_documents(draw: random.Random) -> list[str]:
    """Documents of which every fourth is nearly the one before, and every fifth has personal data."""
    found: list[str] = []
    for number in range(320):
        text = sentences(draw, ENGLISH, 6)
        if number % 4 == 3:
            text = f"{found[-1]} {ENGLISH.split()[number % 50]}."
        if number % 5 == 4:
            text += " " + PERSONAL[number % 2].format(number, number % 250)
        found.append(text)
    return found


def write_documents(path: Path, texts: list[str]) -> None:
    """One record for each document."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


# ---------------------------------------------------------------- running


class FailedError(RuntimeError):
    """A run ended by another exit code than 0, or differs from what it must equal."""


class Proof:
    """Runs in one folder, each made once: `line_of(name)` is what is printed of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lines: dict[str, str] = {}

    def line_of(self, name: str) -> str:
        """The line, without the name; makes the run, and those that it needs before it."""
        if name not in self._lines:
            self._lines[name] = self._made(name, RUNS[name])
        return self._lines[name]

    def _made(self, name: str, said: dict[str, Any]) -> str:
        if "needs" in said:
            self.line_of(said["needs"])
        if "resumes" in said:
            undisturbed = self.line_of(said["resumes"])
            self._resume(name, RUNS[said["resumes"]])
            found = line_of_run(self.folder / name)
            if found != undisturbed:
                raise FailedError(f"it differs from {said['resumes']}:\n{found}\n{undisturbed}")
            return found
        self._call(name, arguments_of(name, said), key=1)
        if said.get("verb") == COMPARE:
            return line_of_comparison(self.folder / name)
        if said.get("verb") == TOKENIZER:
            return f"tokenizer={hash_of_file(self.folder / name / Path(TOKENIZER_FILE).name)}"
        return line_of_run(self.folder / name)

    def _resume(self, name: str, said: dict[str, Any]) -> None:
        self._call(name, arguments_of(name, {**said, "checkpoint_steps": 5}), key=1, stops=True)
        if (self.folder / name / WEIGHTS).exists():
            raise FailedError("it was not stopped")
        self._call(name, [TRAIN, NAMES["out"], name, NAMES["resume"]], key=2)

    def _call(self, name: str, arguments: list[str], key: int, stops: bool = False) -> None:
        """Call the command in a fork of this process.

        Raises:
            FailedError: its exit code is not 0; the message is what it said.
        """
        said = self.folder / f"{name}.said"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with said.open("ab", buffering=0) as file:
                    for number in (1, 2):
                        os.dup2(file.fileno(), number)
                os.chdir(self.folder)
                os.environ[CACHE_VARIABLE] = str(self.folder / f"{name}.cache")
                code = call(arguments, key, stops)
            except BaseException:
                traceback.print_exc()
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 0:
            text = said.read_text(encoding="utf-8", errors="replace")
            raise FailedError(f"exit code {code}\n{' '.join(arguments)}\n{text[-4000:]}")


def arguments_of(name: str, said: dict[str, Any]) -> list[str]:
    """The words of the command line."""
    verb = said.get("verb", TRAIN)
    if verb == TOKENIZER:
        stated = {"vocabulary": SMALL_RUN["vocabulary"], "out": name}
    else:
        stated = {**SMALL_RUN, **said, "out": name}
    if "from" in said:  # the model brings its shape
        stated.update(dict.fromkeys(("hidden", "layers", "heads", "window")))
    found = [verb, *said.get("text", [TEXT])]
    for word, value in stated.items():
        if word in ("text", "verb", "needs") or value is None:
            continue
        option = NAMES[word]
        for each in value if isinstance(value, list) else [value]:
            shown = str(each).lower() if isinstance(each, bool) else str(each)
            if not option.startswith("--"):
                found += ["--set", f"{option}={shown}"]
            else:
                found += [option] if each is True else [option, shown]
    return found


def call(arguments: list[str], key: int, stops: bool) -> int:
    """The command, in this process; `key` stands for what the system draws for a private run.

    It is stopped as by Ctrl-C if it `stops`.
    """
    if NAMES["epsilon"] in arguments or NAMES["resume"] in arguments:
        os.urandom = lambda count: bytes((key + i) % 256 for i in range(count))
    if stops:
        stop_after(STOPPED_AFTER)
    module, _, function = COMMAND.partition(":")
    return getattr(importlib.import_module(module), function)(arguments)


def stop_after(step: int) -> None:
    """Have a signal come at the end of that step, as Ctrl-C sends it."""
    from transformers.trainer_callback import CallbackHandler

    on_step_end = CallbackHandler.on_step_end

    def stopping(self, args, state, control):
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return on_step_end(self, args, state, control)

    CallbackHandler.on_step_end = stopping


# ---------------------------------------------------------------- what came of them


def line_of_run(run: Path) -> str:
    """Hashes and numbers of a run folder."""
    figures = json.loads((run / FIGURES).read_text(encoding="utf-8"))[LIST_OF_FIGURES]
    name, value, *_ = FIGURE_FIELDS
    (bits,) = [figure[value] for figure in figures if figure[name] == BITS]
    parts = {
        "weights": hash_of_tensors(run / WEIGHTS),
        "figures": hash_of(sorted(figure_rows(figures))),
        "bits": repr(bits),
        "tokenizer": hash_of_file(run / TOKENIZER_FILE),
    }
    if (run / PRIVACY).is_file():
        parts["epsilon"] = repr(json.loads((run / PRIVACY).read_text(encoding="utf-8"))[EPSILON])
    kept = sorted(run.glob(MILESTONES))
    if kept:
        parts["milestones"] = hash_of(sorted(hash_of_tensors(path) for path in kept))
    return joined(parts)


def line_of_comparison(folder: Path) -> str:
    """As `line_of_run`, of all runs of a comparison and of its results."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    runs = sorted(folder.glob(RUNS_OF_COMPARISON))
    return joined(
        {
            "weights": hash_of([hash_of_tensors(run / WEIGHTS) for run in runs]),
            "figures": hash_of([values_at(results, path) for path in RESULT_FIGURES]),
            "bits": repr(values_at(results, RESULT_BITS)[0]),
            "tokenizer": hash_of(sorted({hash_of_file(run / TOKENIZER_FILE) for run in runs})),
            "runs": hash_of([line_of_run(run) for run in runs]),
        }
    )


def joined(parts: dict[str, str]) -> str:
    return "  ".join(f"{name}={value}" for name, value in parts.items())


def figure_rows(figures: list[dict[str, Any]]) -> Iterator[list[str]]:
    """What is hashed of each figure that is no time."""
    for figure in figures:
        name, *numbers = (figure[field] for field in FIGURE_FIELDS)
        if not IS_TIME.search(name):
            yield [RENAMED_FIGURES.get(name, name), *map(repr, [*numbers, figure.get(INTERVAL)])]


def values_at(content: Any, path: str) -> list[Any]:
    """All values at a dotted path; `*` is every item of a list."""
    found = [content]
    for word in path.split("."):
        if word == "*":
            found = [item for each in found for item in each]
        else:
            found = [each[int(word) if word.isdigit() else word] for each in found]
    return found


def hash_of_tensors(path: Path) -> str:
    """Of the name, the type, the shape and the bytes of every tensor, in the order of the names."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    tensors = []
    for name, tensor in header.items():
        for pattern, replacement in RENAMED_TENSORS:
            name = re.sub(pattern, replacement, name)
        begin, end = tensor["data_offsets"]
        tensors.append((name, tensor["dtype"], tensor["shape"], hashlib.sha256(data[begin:end]).hexdigest()))
    return hash_of(sorted(tensors))


def hash_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()[:16]


# ---------------------------------------------------------------- the script


def prepare_process() -> None:
    """One thread, no GPU, no network, and the package beside this file; libraries are imported once."""
    root = str(Path(__file__).resolve().parents[2])
    one = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "HF_HUB_OFFLINE")
    os.environ.update(
        dict.fromkeys(one, "1"),
        ACCELERATE_USE_CPU="true",
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    sys.path.insert(0, root)
    for library in ("torch", "transformers.trainer", "accelerate", "datasets", "matplotlib.pyplot", "opacus"):
        importlib.import_module(library)
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # a search for garbage in a fork would copy all memory that it shares


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help=f"of {', '.join(RUNS)}")
    chosen = parser.parse_args().only or list(RUNS)
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder))
        proof = Proof(Path(folder))
        made = [print_line(proof, name) for name in chosen]
        return int(not all(made))


def print_line(proof: Proof, name: str) -> bool:
    """Whether the run was made and read."""
    try:
        line, is_made = proof.line_of(name), True
    except (FailedError, OSError, LookupError, ValueError) as error:
        line, is_made = "failed", False
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{name:{max(map(len, RUNS))}}  {line}", flush=True)
    return is_made


if __name__ == "__main__":
    sys.exit(main())
