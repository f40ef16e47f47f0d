"""The verbs of the command line and their options. `cli` gives each verb its meaning."""

import argparse
from typing import Any, NoReturn

from hf_genlm.cli.arguments_of_models import MODEL_HELP, add_verbs_of_models
from hf_genlm.cli.option_types import amount, amounts, count, counts, words
from hf_genlm.errors import UserError

# option -> the recipe field that it sets
VOCABULARY_FIELD = {"vocab_size": "tokenizer.vocab_size"}
SOURCE_FIELD = {"languages": "corpus.languages"}
LANGUAGE_FIELDS = {**SOURCE_FIELD, "parallel": "corpus.parallel"}
MODEL_FIELDS = {
    "decoder": "model.decoder",
    "mixers": "model.mixers",
    "size": "model.size",
    "vectors": "vectors.path",
    **VOCABULARY_FIELD,
}
TRAIN_FIELDS = {
    **MODEL_FIELDS,
    "init_from": "model.init_from",
    "minutes": "training.minutes",
    "steps": "training.steps",
    "tokens": "training.tokens",
    "seed": "training.seed",
    "validation": "corpus.validation",
    "stream": "corpus.stream",
    "canaries": "privacy.canaries",
    "scrub": "corpus.scrub",
    "near_duplicates": "corpus.near_duplicates",
    "epsilon": "privacy.epsilon",
    "delta": "privacy.delta",
    **LANGUAGE_FIELDS,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (hf-genlm --help lists what there is)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; the one that was given is in `verb` of what it parses."""
    parser = _Parser(
        prog="hf-genlm", description="From a folder of text to your own small generative language model."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    _add_train(verbs)
    _add_tokenizer(verbs)
    _add_extend(verbs)
    _add_evaluate(verbs)
    _add_audit(verbs)
    _add_compare(verbs)
    _add_range(verbs)
    add_verbs_of_models(verbs)
    _add_doctor(verbs)
    return parser


def _add_train(verbs: Any) -> None:
    train = verbs.add_parser("train", help="train a tokenizer and a model, and measure it")
    train.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="files, folders, globs or a Hub dataset id; nothing: the library source that Python brings",
    )
    _add_language_options(train)
    _add_model_options(train)
    train.add_argument(
        "--minutes", metavar="F", help="train for so long (default 3), the rate decaying to its end"
    )
    train.add_argument("--steps", metavar="N", help="train for so many optimizer steps")
    train.add_argument("--tokens", metavar="N", help="train on so many tokens")
    train.add_argument(
        "--validation", action="append", metavar="FILE", help="hold out this, instead of splitting"
    )
    train.add_argument(
        "--stream",
        action="store_const",
        const=True,
        help="read while training, and keep nothing: for text larger than memory and disk",
    )
    _add_cleaning_options(train)
    train.add_argument("--from", dest="init_from", metavar="MODEL", help="go on from a run or model folder")
    train.add_argument(
        "--canaries",
        metavar="N,N,..",
        help="plant random secrets in the training text, each so many times, as 1,4,16,32, for audit",
    )
    train.add_argument("--seed", metavar="N", help="of the weights and the order of rows (default 0)")
    train.add_argument(
        "--epsilon", metavar="E", help="train with differential privacy for each document, spending so much"
    )
    train.add_argument(
        "--delta", metavar="D", help="chance that this guarantee fails (default n^-1.1 of n documents)"
    )
    train.add_argument("--out", metavar="DIR", help="the run folder to make (default runs/DECODER-DATE)")
    train.add_argument("--resume", action="store_true", help="go on with the run that lies in --out")
    train.add_argument(
        "--processes",
        type=count,
        metavar="N",
        help="train by so many processes, on a GPU each where there are any (default 1)",
    )


def _add_tokenizer(verbs: Any) -> None:
    tokenizer = verbs.add_parser("tokenizer", help="train a byte-level BPE tokenizer")
    tokenizer.add_argument("sources", nargs="*", metavar="SOURCE")
    tokenizer.add_argument("--out", required=True, metavar="DIR")
    _add_language_options(tokenizer)
    _add_vocabulary_option(tokenizer)
    _add_recipe_options(tokenizer)


def _add_extend(verbs: Any) -> None:
    extend = verbs.add_parser("extend", help="give a trained model tokens for another language")
    extend.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    extend.add_argument("sources", nargs="*", metavar="SOURCE", help="text to learn the tokens from")
    _add_source_option(extend)
    extend.add_argument("--vocab-size", required=True, metavar="+N", help="how many tokens to add")
    extend.add_argument("--keep", action="append", metavar="SOURCE", help="text whose token ids stay")
    extend.add_argument("--out", required=True, metavar="DIR", help="the model folder to make")
    _add_recipe_options(extend)


def _add_evaluate(verbs: Any) -> None:
    evaluate = verbs.add_parser("evaluate", help="measure any causal language model, exactly")
    evaluate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="default: the run's own validation split"
    )
    evaluate.add_argument(
        "--suite",
        metavar="A,B,..",
        help="likelihood, range, extrapolation, samples, minimal_pairs, lm_eval; default: what SOURCE, "
        "--pairs and --tasks ask for",
    )
    evaluate.add_argument(
        "--pairs", metavar="PATH", help="a .jsonl file of BLiMP's format, or a folder of them"
    )
    evaluate.add_argument("--tasks", metavar="A,B,..", help="tasks of lm-eval; pip install 'hf_genlm[eval]'")
    evaluate.add_argument("--include-path", metavar="DIR", help="where task files besides lm-eval's own are")
    evaluate.add_argument("--json", action="store_true", help="print the measurements as JSON")
    _add_recipe_options(evaluate)


def _add_audit(verbs: Any) -> None:
    audit = verbs.add_parser("audit", help="attack a model: what does it give away of its training text?")
    audit.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    audit.add_argument(
        "--train",
        action="append",
        metavar="SOURCE",
        help="text that it was trained on (default: that of the run, read again)",
    )
    audit.add_argument(
        "--held-out", action="append", metavar="SOURCE", help="text of the same kind that it has not seen"
    )
    audit.add_argument("--reference", metavar="MODEL", help="a causal model that has not seen the text")
    audit.add_argument(
        "--attacks",
        metavar="A,B,..",
        help="exposure (of canaries), extraction, membership; default: all that can be made",
    )
    audit.add_argument(
        "--limit", type=count, default=1000, metavar="N", help="passages of each side (default 1000)"
    )
    audit.add_argument("--seed", type=int, default=0, metavar="N", help="of the passages (default 0)")
    audit.add_argument("--out", metavar="DIR", help="where audit.json goes (default: the run folder)")
    audit.add_argument("--json", action="store_true", help="print the measurements as JSON")
    _add_recipe_options(audit)


def _add_compare(verbs: Any) -> None:
    compare = verbs.add_parser(
        "compare", help="which decoder, size or recipe is best for a text, and how sure"
    )
    compare.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="as of train; nothing: the library source of Python"
    )
    compare.add_argument("--decoders", type=words, default=[], metavar="A,B,..", help="candidates")
    compare.add_argument(
        "--sizes", type=words, default=[], metavar="A,B,..", help="candidates, or of each decoder"
    )
    compare.add_argument("--recipes", type=words, default=[], metavar="FILE,..", help="candidates, instead")
    compare.add_argument("--minutes", metavar="F", help="train each run for so long (default 3)")
    compare.add_argument("--steps", metavar="N", help="or for so many optimizer steps")
    compare.add_argument("--tokens", metavar="N", help="or on so many tokens")
    compare.add_argument("--flops", metavar="F", help="or for so many FLOPs, as 1e15")
    compare.add_argument("--parameters", metavar="N", help="all candidates at about so many, as 3M")
    compare.add_argument("--seeds", type=count, default=3, metavar="N", help="runs of each (default 3)")
    compare.add_argument("--validation", action="append", default=[], metavar="FILE", help="hold out this")
    compare.add_argument(
        "--own-tokenizers",
        action="store_true",
        help="a tokenizer for each recipe by what it says, instead of one for all",
    )
    compare.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="SECTION.KEY=VALUE",
        help="for all candidates",
    )
    compare.add_argument(
        "--out", required=True, metavar="DIR", help="the folder to make, or to go on with by the same command"
    )


def _add_range(verbs: Any) -> None:
    measure = verbs.add_parser("range", help="train small decoders on tasks that show how far they remember")
    measure.add_argument(
        "--decoders",
        default="elman,gru,lstm,gated_linear,transformer,sliding,hybrid",
        metavar="A,B,..",
        help="default: all of them",
    )
    measure.add_argument(
        "--tasks", default="recall,copy,passkey", metavar="A,B,..", help="default: recall,copy,passkey"
    )
    measure.add_argument("--pairs", type=counts, metavar="N,N,..", help="of recall (default 4,8,16,32,64)")
    measure.add_argument(
        "--lengths", type=counts, metavar="N,N,..", help="of copy and passkey (default 64,128,256)"
    )
    measure.add_argument(
        "--steps", type=count, default=400, metavar="N", help="of training, for each model (default 400)"
    )
    measure.add_argument(
        "--minutes", type=amount, metavar="F", help="of training, for each model, instead of steps"
    )
    measure.add_argument("--seeds", type=count, default=3, metavar="N", help="so many (default 3)")
    measure.add_argument(
        "--rates",
        type=amounts,
        default=[0.003, 0.001],
        metavar="F,F,..",
        help="learning rates to try in order, the next where one is not enough (default 0.003,0.001)",
    )
    measure.add_argument("--width", type=count, default=64, metavar="N", help="of the models (default 64)")
    measure.add_argument("--layers", type=count, default=2, metavar="N", help="of each model (default 2)")
    measure.add_argument(
        "--out", default="range", metavar="DIR", help="the folder to fill, or to go on with (default range)"
    )


def _add_doctor(verbs: Any) -> None:
    doctor = verbs.add_parser("doctor", help="say what this machine can do, or what a model will cost")
    doctor.add_argument(
        "--parameters",
        nargs="?",
        const="",
        metavar="RUN",
        help="parameters, FLOPs and memory of the model of this run folder, or that the options below make",
    )
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    _add_model_options(doctor)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """What decides the model, for every verb that makes one: MODEL_FIELDS and a recipe."""
    parser.add_argument(
        "--decoder", help="gated_linear (default), gru, lstm, elman, transformer, sliding or hybrid"
    )
    parser.add_argument("--mixers", metavar="A,B,..", help="one mixer per layer, instead of --decoder")
    parser.add_argument("--size", help="tiny (default), small, base, or a parameter count such as 30M")
    parser.add_argument("--vectors", metavar="FILE", help="start the embedding from word vectors")
    _add_vocabulary_option(parser)
    _add_recipe_options(parser)


def _add_source_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        action="append",
        dest="languages",
        metavar="CODE=SOURCE",
        help="a source in a language, as fra=texts/; corpus.temperature balances them",
    )


def _add_language_options(parser: argparse.ArgumentParser) -> None:
    _add_source_option(parser)
    parser.add_argument(
        "--parallel",
        action="append",
        metavar="CODE=FILE",
        help="a file of sentences, a line each, that are those of the other languages' files",
    )


def _add_cleaning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scrub",
        action="store_const",
        const="all",
        help="replace e-mail and IP addresses, phone, card and account numbers and keys by placeholders",
    )
    parser.add_argument(
        "--near-duplicates",
        metavar="F",
        help="leave out training documents that share so much of their 5-word runs with another, as 0.8",
    )


def _add_vocabulary_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vocab-size", metavar="N", help="tokens in the vocabulary; default: by the size of the text"
    )


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="FILE", help="a YAML recipe")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="SECTION.KEY=VALUE")
