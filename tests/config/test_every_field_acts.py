"""Promise: every field of a recipe changes something that a person can see.

ACTS has a row for each field: assignments that both recipes share, the value that differs from the default,
and an observer, which returns what is compared: weights and figures of a tiny run, its events, rows, files or
card. A field without a row fails, and so does an observer that does not repeat itself.
"""

import functools
import hashlib
import itertools
import json
import lzma
import tempfile
from pathlib import Path

import pytest
import torch
from support.cards import make_run

from hf_genlm.card import write_card
from hf_genlm.config.recipe import Recipe, describe_fields, load_recipe
from hf_genlm.config.settings import Facts
from hf_genlm.config.settle import settle, settle_reading
from hf_genlm.errors import UserError
from hf_genlm.model import GenLMConfig, GenLMForCausalLM
from hf_genlm.privacy.mechanism import KEY_BYTES
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.languages import balanced_text
from hf_genlm.training.budget import Budget
from hf_genlm.training.corpus import prepare_corpus, prepare_stream
from hf_genlm.training.private import PrivateState, begin_private, private_gradient
from hf_genlm.training.train import train
from hf_genlm.training.trainer import training_arguments_of

SENTENCE = "the river ran under an old stone bridge while nine quiet birds watched it from far banks of time"
WORDS = SENTENCE.split()
TINY = (
    "tokenizer.vocab_size=270",
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.bigram_size=16",
    "training.max_seq_length=16",
    "training.batch_size=4",
    "training.steps=4",
    "training.num_threads=1",
    "training.num_validations=0",
    "training.num_samples=0",
    "training.logging_steps=1",
    "corpus.sources={text}",
)


@functools.cache
def texts() -> dict[str, str]:
    """Paths of all sources, by the name that stands in an assignment."""
    folder = Path(tempfile.mkdtemp())
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 13)) + f" {i}." for i in range(240)]
    copies = [f"{line} once more." for line in lines[:20]]
    personal = [f"write to anna{i}@example.org or call 030 1234567{i} now" for i in range(4)]
    records = [json.dumps({"text": line, "body": line[::-1]}) for line in [*lines, *copies, *personal]]
    content = {
        "text": ("text.jsonl", "\n".join(records)),
        "other": ("other.jsonl", "\n".join(json.dumps({"text": line.upper()}) for line in lines[:120])),
        "held": ("held.jsonl", "\n".join(json.dumps({"text": f"held out {line}"}) for line in lines[:9])),
        "damaged": ("damaged.jsonl", "\n".join([*records[:50], "{", *records[50:]])),
        "parallel": ("parallel.txt", "one line\nand another\n"),
        "longer": ("longer.txt", "one much longer line\nand another one\n"),
        "vectors": (
            "vectors.txt",
            "".join(f"{w} {i / 9} {1 - i / 7} {i % 3} 1\n" for i, w in enumerate(WORDS)),
        ),
        "bad": (
            "bad.txt",
            "".join(f"{w} {i / 9} {1 - i / 7} 2 1\n" for i, w in enumerate(WORDS)) + "torn 1\n",
        ),
    }
    paths = {}
    for name, (file, written) in content.items():
        (folder / file).write_text(written, encoding="utf-8")
        paths[name] = str(folder / file)
    (folder / "latin.txt").write_bytes("café au lait\n".encode("latin-1") * 50)
    paths["latin"] = str(folder / "latin.txt")
    (folder / "wide.txt.xz").write_bytes(lzma.compress(b"wide words\n" * 50, preset=9))
    paths["wide"] = str(folder / "wide.txt.xz")
    run = train(recipe_of(TINY, paths), folder / "base")
    return {**paths, "base": str(run.path), "tokenizer": str(run.tokenizer)}


def recipe_of(assignments: tuple[str, ...], paths: dict[str, str] | None = None) -> Recipe:
    """A recipe; a later assignment of a field replaces an earlier one, and `{name}` stands for a path."""
    stated = dict(a.format(**(paths or texts())).partition("=")[::2] for a in assignments)
    ends = [name for name in ("training.minutes", "training.tokens") if name in stated]
    if ends:
        stated.pop("training.steps", None)
    return load_recipe(None, [f"{name}={value}" for name, value in stated.items()])


def new_folder() -> Path:
    return Path(tempfile.mkdtemp()) / "run"


def digest(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


# observers: recipe -> what is compared


def weights(recipe: Recipe) -> str:
    return digest((train(recipe, new_folder()).model / "model.safetensors").read_bytes())


def figures(recipe: Recipe) -> str:
    """Measurements of the saved model."""
    return digest(train(recipe, new_folder()).evaluation.read_text())


def events(recipe: Recipe) -> list:
    """Names of logged events, checkpoints as they lay there, files, and threads, of a tiny run."""
    seen: list = []
    out = new_folder()

    def listen(event: str, fields: dict) -> None:
        if event in ("step", "validation", "sample", "milestone"):
            seen.append((event, fields["step"], torch.get_num_threads()))
        if event == "checkpoint":
            seen.append(sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*")))

    run = train(recipe, out, listen)
    return [seen, sorted(path.name for path in run.path.iterdir()), (run.path / "samples.md").exists()]


def batches(recipe: Recipe) -> int:
    """Most rows in one forward pass of the evaluation."""
    rows = [0]

    def hook(module, arguments, keywords):
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        if isinstance(module, GenLMForCausalLM) and ids is not None and not module.training:
            rows[0] = max(rows[0], len(ids))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, arguments: hook(module, arguments, {})
    )
    keep = GenLMForCausalLM.forward

    def forward(self, *arguments, **keywords):
        hook(self, arguments, keywords)
        return keep(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenLMForCausalLM, "forward", forward)
        train(recipe, new_folder())
    handle.remove()
    return rows[0]


def documents(recipe: Recipe) -> list:
    """Documents of both splits as they are trained on, or the error that reading ends with."""
    recipe = settle_reading(recipe, Facts())
    try:
        corpus = read_corpus(recipe.corpus)
    except UserError as error:
        return [str(error)]
    train_text = balanced_text(corpus.train, corpus.report.get("languages", {}))
    sides = [[document.text for document in side] for side in (train_text, corpus.validation)]
    return [*sides, corpus.report.get("languages"), corpus.report["encoding"]]


def rows(recipe: Recipe) -> list:
    """First rows of the training text, streamed or in memory, and the size of the validation text."""
    corpus = (prepare_stream if recipe.corpus.stream else prepare_corpus)(
        RunFolder.create(new_folder()), recipe
    )
    found = corpus.rows(settle(recipe).training)
    first = itertools.islice(found, 20) if recipe.corpus.stream else (found[i] for i in range(20))
    ids = [torch.as_tensor(row["input_ids"]).tolist() for row in first]
    return [type(found).__name__, ids, corpus.validation.n_tokens]


def parallel_figures(recipe: Recipe) -> str:
    """Tokenization measured per language, which a parallel text adds to."""
    run = RunFolder.create(new_folder())
    prepare_corpus(run, recipe)
    return run.languages.read_text()


def vocabulary(recipe: Recipe) -> str:
    run = RunFolder.create(new_folder())
    prepare_corpus(run, recipe)
    return digest((run.tokenizer / "tokenizer.json").read_bytes())


def secrets_planted(recipe: Recipe) -> str | None:
    run = RunFolder.create(new_folder())
    corpus = prepare_corpus(run, recipe)
    return (
        f"{run.canaries.read_text() if run.canaries.exists() else None} {digest(corpus.train.ids.tobytes())}"
    )


def cached(recipe: Recipe) -> int:
    """Files in the cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tempfile.mkdtemp()
        patch.setenv("HF_GENLM_CACHE", folder)
        prepare_corpus(RunFolder.create(new_folder()), recipe)
        return len([path for path in Path(folder).rglob("*") if path.is_file()])


def logits(recipe: Recipe) -> list:
    """Names and shapes of parameters, and logits in training and evaluation mode."""
    config = settle(recipe, Facts(vocab_size=31)).architecture
    torch.manual_seed(0)
    model = GenLMForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        ids = torch.arange(12)[None] % 31
        outputs = [model.train(mode)(ids).logits for mode in (False, True)]
    return [
        [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()],
        [digest(output.numpy().tobytes()) for output in outputs],
    ]


def length(recipe: Recipe) -> tuple:
    """Length of a run that read 10,000 tokens and measured 0.1 s per step."""
    found = settle(recipe, Facts(train_tokens=10_000, step_s=0.1)).length
    return found.max_steps, found.seconds, found.expected_steps


def arguments(recipe: Recipe) -> tuple:
    """Compiler and precision of Trainer."""
    run = RunFolder(new_folder())
    found = training_arguments_of(run, settle(recipe).training, Budget(steps=1), hidden_size=32)
    return found.torch_compile_backend, found.torch_compile, found.bf16


def private_step(recipe: Recipe) -> str:
    """Noisy gradient of a step of a private run over 2,000 documents."""
    settings = settle(recipe)
    state = begin_private(RunFolder.create(new_folder()), settings, n_documents=2000)
    state = PrivateState(state.guarantee, bytes(KEY_BYTES))
    torch.manual_seed(0)
    model = GenLMForCausalLM(settings.architecture)
    ids = torch.arange(32).reshape(4, 8)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8).expand_as(ids)}
    private_gradient(model, inputs, state, 0, settings.training, 4)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return digest(b"".join(gradient.numpy().tobytes() for gradient in gradients))


def card(recipe: Recipe) -> str:
    run = make_run(Path(tempfile.mkdtemp()), recipe=recipe.model_copy(deep=True))
    return write_card(run).read_text(encoding="utf-8")


LANGUAGES = ("corpus.sources=", "corpus.languages=eng={text},deu={other}")
STREAM = ("corpus.stream=true", "corpus.sources={text},{other}", "corpus.validation_bytes=500")
ATTENTION = ("model.decoder=transformer", "model.bigram_size=0", "model.num_attention_heads=4")
SLIDING = ("model.decoder=sliding", "model.bigram_size=0", "model.num_attention_heads=2")
VECTORS = ("vectors.path={vectors}",)
PLANTED = ("privacy.canaries=2,4",)
PRIVATE = ("privacy.epsilon=20", "corpus.sources=")
OPEN = ("training.minutes=1",)

# field -> (assignments of both recipes, besides TINY; the value; the observer)
ACTS = {
    "corpus.sources": ((), "{other}", documents),
    "corpus.languages": (("corpus.sources=",), "eng={text},deu={other}", documents),
    "corpus.validation": ((), "{held}", documents),
    "corpus.validation_fraction": ((), "0.3", documents),
    "corpus.split_seed": ((), "1", documents),
    "corpus.split_by_hash": ((), "true", documents),
    "corpus.encoding": (("corpus.sources={latin}",), "latin-1", documents),
    "corpus.temperature": (LANGUAGES, "4", documents),
    "corpus.byte_premiums": ((*LANGUAGES, "corpus.temperature=4"), "eng=1,deu=3", documents),
    "corpus.parallel": (LANGUAGES, "eng={parallel},deu={longer}", parallel_figures),
    "corpus.text_column": ((), "body", documents),
    "corpus.unpack_memory_mb": (("corpus.sources={wide}",), "64", documents),
    "corpus.documents": (("corpus.sources={vectors}",), "lines", documents),
    "corpus.damaged": (("corpus.sources={damaged}",), "skip", documents),
    "corpus.keep_held_out": (("corpus.validation={held}", "corpus.sources={held},{text}"), "true", documents),
    "corpus.scrub": ((), "email", documents),
    "corpus.phone_regions": (("corpus.scrub=phone",), "DE", documents),
    "corpus.near_duplicates": ((), "0.6", documents),
    "corpus.stream": (("corpus.validation_bytes=500",), "true", rows),
    "corpus.shuffle_buffer": (STREAM, "0", rows),
    "corpus.weights": (STREAM, "1,9", rows),
    "corpus.validation_bytes": (STREAM, "3000", rows),
    "corpus.cache": ((), "false", cached),
    "tokenizer.path": (("tokenizer.vocab_size=null",), "{tokenizer}", vocabulary),
    "tokenizer.vocab_size": (("tokenizer.vocab_size=null",), "280", vocabulary),
    "tokenizer.pattern": (("tokenizer.vocab_size=300",), "gpt2", vocabulary),
    "tokenizer.max_characters": ((), "600", vocabulary),
    "model.init_from": ((), "{base}", weights),
    "model.decoder": ((), "lstm", logits),
    "model.mixers": ((), "gru", logits),
    "model.size": (("model.hidden_size=null",), "small", logits),
    "model.hidden_size": ((), "32", logits),
    "model.num_hidden_layers": ((), "2", logits),
    "model.num_attention_heads": (ATTENTION, "2", logits),
    "model.num_key_value_heads": (ATTENTION, "1", logits),
    "model.qk_norm": (ATTENTION, "false", logits),
    "model.intermediate_size": ((), "24", logits),
    "model.gated_mlp": ((), "true", logits),
    "model.hidden_act": ((), "silu", logits),
    "model.mlp_rank": ((), "4", logits),
    "model.shared_layers": (("model.num_hidden_layers=2",), "2", logits),
    "model.embedding_size": ((), "8", logits),
    "model.bigram_size": ((), "32", logits),
    "model.ngram_order": ((), "0", logits),
    "model.ngram_entries": (("model.ngram_order=3",), "50", weights),
    "model.ngram_history": ((), "0", logits),
    "model.position_type": (ATTENTION, "none", logits),
    "model.sliding_window": (SLIDING, "2", logits),
    "model.tie_word_embeddings": (("training.init=random",), "true", logits),
    "model.output_bias": ((), "false", logits),
    "model.final_logit_softcapping": ((), "2", logits),
    "model.dropout": ((), "0.4", weights),
    "vectors.path": ((), "{vectors}", weights),
    "vectors.damaged": (("vectors.path={bad}",), "skip", weights),
    "vectors.frozen": (VECTORS, "true", weights),
    "vectors.unfreeze_step": ((*VECTORS, "vectors.frozen=true"), "1", weights),
    "training.minutes": ((), "2", length),
    "training.steps": ((), "2", weights),
    "training.tokens": ((), "100", weights),
    "training.max_epochs": (OPEN, "1", length),
    "training.seed": ((), "1", weights),
    "training.max_seq_length": ((), "8", weights),
    "training.batch_size": ((), "2", weights),
    "training.gradient_accumulation_steps": ((), "2", weights),
    "training.carry_state": ((), "true", weights),
    "training.init": ((), "random", weights),
    "training.optimizer": ((), "sgd", weights),
    "training.learning_rate": ((), "0.1", weights),
    "training.embedding_lr_ratio": ((), "3", weights),
    "training.matrix_lr_ratio": (("training.optimizer=muon",), "2", weights),
    "training.weight_decay": ((), "5", weights),
    "training.embedding_decay_ratio": ((), "7", weights),
    "training.bigram_decay_ratio": ((), "7", weights),
    "training.adam_beta1": ((), "0.3", weights),
    "training.adam_beta2": ((), "0.3", weights),
    "training.max_grad_norm": ((), "0.01", weights),
    "training.label_smoothing_factor": ((), "0.3", weights),
    "training.z_loss": ((), "0.1", weights),
    "training.network_share": ((), "0.9", weights),
    "training.warmup_ratio": (("training.warmup_steps=0",), "0.9", weights),
    "training.warmup_steps": ((), "7", weights),
    "training.decay_ratio": (("training.warmup_steps=0",), "0.1", weights),
    "training.num_threads": ((), "2", events),
    "training.torch_compile_backend": ((), "aot_eager", arguments),
    "training.dtype": ((), "bfloat16", arguments),
    "training.num_validations": ((), "1", events),
    "training.num_samples": ((), "1", events),
    "training.save_minutes": ((), "0", events),
    "training.save_steps": ((), "1", events),
    "training.save_total_limit": (("training.save_steps=1",), "1", events),
    "training.milestone_words": ((), "40", events),
    "training.logging_steps": ((), "4", events),
    "training.report_to": ((), "tensorboard", events),
    "evaluation.context_length": ((), "8", figures),
    "evaluation.stride": (("evaluation.context_length=8",), "1", figures),
    "evaluation.batch_size": ((), "3", batches),
    "evaluation.carry_state": (("evaluation.context_length=4",), "true", figures),
    "privacy.canaries": ((), "2,4", secrets_planted),
    "privacy.canaries_each": (PLANTED, "3", secrets_planted),
    "privacy.canaries_seed": (PLANTED, "1", secrets_planted),
    "privacy.epsilon": (PRIVATE, "5", private_step),
    "privacy.delta": (PRIVATE, "1e-6", private_step),
    "privacy.clip_norm": (PRIVATE, "0.1", private_step),
    "privacy.secure_noise": (PRIVATE, "true", private_step),
    "card.name": ((), "another", card),
    "card.license": ((), "mit", card),
    "card.license_name": (("card.license=other", "card.license_link=LICENSE"), "own-1.0", card),
    "card.license_link": (("card.license=other", "card.license_name=own-1.0"), "https://example.org", card),
    "card.corpus": ((), "Tales", card),
    "card.language": ((), "fr", card),
    "card.authors": ((), "Ada", card),
    "card.url": ((), "https://example.org", card),
    "card.citation": ((), "@misc{{own}}", card),
    "card.intended_use": ((), "To try it.", card),
    "card.datasets": ((), "owner/poems", card),
    "card.base_model": ((), "owner/base", card),
    "card.private_figures": (PRIVATE, "true", card),
    "card.tags": ((), "poetry", card),
}


@functools.cache
def before(observer, shared: tuple[str, ...]):
    return _observed(observer, recipe_of((*TINY, *shared)))


def _observed(observer, recipe: Recipe):
    try:
        return observer(recipe)
    except UserError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("name", [row.name for row in describe_fields()])
def test_a_field_changes_what_is_seen(name):
    assert name in ACTS, f"{name} has no row: add one that shows what it changes"
    shared, value, observer = ACTS[name]
    stated = recipe_of((*TINY, *shared, f"{name}={value}"))
    section, _, key = name.partition(".")
    assert getattr(getattr(stated, section), key) != getattr(
        getattr(recipe_of((*TINY, *shared)), section), key
    )
    after = observer(stated)
    assert after != before(observer, shared)


def test_every_row_is_of_a_field():
    assert not ACTS.keys() - {row.name for row in describe_fields()}


REPEATED = sorted({row[2] for row in ACTS.values()}, key=lambda observer: observer.__name__)


@pytest.mark.parametrize("observer", REPEATED, ids=lambda observer: observer.__name__)
def test_an_observer_repeats_itself(observer):
    """Otherwise any field would seem to act."""
    shared = next(row[0] for row in ACTS.values() if row[2] is observer)
    assert _observed(observer, recipe_of((*TINY, *shared))) == before(observer, shared)


@pytest.mark.parametrize(
    "field",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
        {"rms_norm_eps": 0.5},
        {"head_dim": 4},
        {"attention_dropout": 0.5},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_field_of_the_config_alone_changes_logits(field):
    shape = {"vocab_size": 31, "hidden_size": 16, "decoder": "transformer", "num_hidden_layers": 1}

    def output(**fields):
        torch.manual_seed(0)
        model = GenLMForCausalLM(GenLMConfig(**shape, num_attention_heads=2, **fields)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            return model(torch.arange(12)[None]).logits

    assert torch.equal(output(), output())
    assert not torch.equal(output(), output(**field))
