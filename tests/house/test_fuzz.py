"""Promise: whatever is given as config, recipe or file gives what it says, or one line that says why not.

For a config that line is an error of the family that transformers' users expect (ValueError, TypeError,
StrictDataclassError); for all else a UserError. HF_GENLM_FUZZ=N makes N examples in all; the slow form makes
100,000.
"""

import bz2
import gzip
import json
import lzma
import math
import os
import string
from collections import Counter

import pytest
import torch
import zstandard
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.corpora import parquet_of, zipped

from hf_genlm.config.recipe import CorpusRecipe, Recipe, describe_fields, load_recipe
from hf_genlm.config.settle import settle
from hf_genlm.errors import UserError
from hf_genlm.model import DECODERS, MIXER_TYPES, GenLMConfig, GenLMForCausalLM
from hf_genlm.text.corpus import read_documents
from hf_genlm.text.formats import OTHER_PROGRAMS

SHORT, LONG = 400, 100_000
RAN: Counter[str] = Counter()  # examples by property, for those who ask how many there were


def examples(n: int, share: float):
    """Settings for `share` of `n` examples."""
    return settings(
        max_examples=max(1, round(n * share)),
        deadline=None,
        derandomize=n <= SHORT,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def one_line(error: BaseException) -> None:
    message = str(error)
    assert message.strip()
    assert len(message.splitlines()) == 1, message


# values that are near a right one, and those that are not

WHOLE = st.one_of(st.integers(-3, 70), st.sampled_from([0, 2**31, 2**53 + 1, 10**30, -(10**30)]))
REAL = st.one_of(
    st.floats(), st.floats(0, 1), st.sampled_from([0.0, 1.0, -1.0, 1e308, 1e-320, float("inf"), float("nan")])
)
SCALAR = st.one_of(st.none(), st.booleans(), WHOLE, REAL, st.text(max_size=8))
ANYTHING = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


# configs

SIZES = ("vocab_size", "hidden_size", "embedding_size", "bigram_size", "num_hidden_layers", "shared_layers",
         "recurrent_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
         "intermediate_size", "mlp_rank", "max_position_embeddings")  # fmt: skip
FIELDS = {
    **dict.fromkeys(SIZES, st.sampled_from([1, 2, 4, 4, 8, 8, 16, 12, 3])),
    "embedding_projection": st.none() | st.booleans(),
    "mixer_types": st.none() | st.lists(st.sampled_from(MIXER_TYPES), min_size=1, max_size=4),
    "decoder": st.none() | st.sampled_from(list(DECODERS)),
    "hidden_act": st.sampled_from(["relu2", "gelu", "silu", "tanh", "prelu"]),
    "position_type": st.sampled_from(["rotary", "learned", "none"]),
    "gated_mlp": st.booleans(),
    "qk_norm": st.booleans(),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-5]),
    "dropout": st.sampled_from([0.0, 0.1, 0.999]),
    "attention_dropout": st.sampled_from([0.0, 0.1]),
    "output_bias": st.booleans(),
    "final_logit_softcapping": st.sampled_from([None, 1.0, 30.0]),
    "tie_word_embeddings": st.booleans(),
    "initializer_range": st.sampled_from([0.0, 0.02, 1.0]),
    "use_cache": st.booleans(),
    "pad_token_id": st.none() | st.integers(0, 1),
    "bos_token_id": st.none() | st.integers(0, 1),
    "eos_token_id": st.none() | st.integers(0, 1) | st.lists(st.integers(0, 1), max_size=2),
    "rope_parameters": st.none()
    | st.fixed_dictionaries(
        {"rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope", "x"])},
        optional={
            "rope_theta": st.sampled_from([10_000.0, 500.0, 1]) | SCALAR,
            "factor": st.sampled_from([1.0, 2.0, 8]) | SCALAR,
            "original_max_position_embeddings": st.sampled_from([4, 16]) | SCALAR,
            "low_freq_factor": st.sampled_from([1.0]) | SCALAR,
            "high_freq_factor": st.sampled_from([4.0]) | SCALAR,
            "partial_rotary_factor": st.sampled_from([0.5, 1.0]) | SCALAR,
            "short_factor": st.lists(st.floats(1, 2), max_size=3) | SCALAR,
            "long_factor": st.lists(st.floats(1, 2), max_size=3) | SCALAR,
        },
    ),
}
SMALL = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1}


@st.composite
def configs(draw):
    """Fields of a small config, up to three of them replaced by anything, and sometimes a slip of a key."""
    names = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=5, unique=True))
    fields = {**SMALL, **{name: draw(FIELDS[name]) for name in names}}
    if fields.get("mixer_types"):
        fields["num_hidden_layers"] = len(fields["mixer_types"])
        fields.pop("decoder", None)
    for name in draw(st.just([]) | st.lists(st.sampled_from(list(FIELDS)), max_size=2)):
        fields[name] = draw(ANYTHING)
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(SIZES[:8]))
        at = draw(st.integers(0, len(name) - 1))
        fields[name[:at] + name[at + 1 :]] = 5
    return fields


def check_config(fields: dict) -> str:
    try:
        config = GenLMConfig(**fields)
    except (ValueError, TypeError, StrictDataclassError):
        return "refused"
    for name, value in fields.items():
        assert name in FIELDS, f"a slip of a key is taken: {name}"
        if name in SIZES and value is not None:
            assert getattr(config, name) == value
            assert type(value) is int
            assert value > 0
    as_json = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = GenLMConfig.from_dict(as_json)
    assert again.to_dict() == config.to_dict()
    widths = [getattr(config, name) or 1 for name in SIZES if name != "max_position_embeddings"]
    if max(widths) > 128 or config.max_position_embeddings > 4096 or config.num_hidden_layers > 4:
        return "taken"
    torch.manual_seed(0)
    model = GenLMForCausalLM(config).eval()
    with torch.no_grad():
        ids = torch.arange(4)[None] % config.vocab_size
        ids = ids[:, : config.max_position_embeddings] if config.position_type == "learned" else ids
        logits = model(ids).logits
    assert logits.shape == (*ids.shape, config.vocab_size)
    assert torch.isfinite(logits).all()
    return "built"


# recipes

KINDS = {row.name: row.kind for row in describe_fields()}
CHOICES = {row.name: row.allowed.split(", ") for row in describe_fields() if row.kind.startswith("a word")}
NAMES = list(KINDS)
NEAR = {
    "true or false": st.sampled_from(["true", "false"]),
    "a whole number": st.sampled_from(["1", "2", "4", "8", "64", "300", "1e2"]),
    "a number": st.sampled_from(["0.5", "1", "0.01", "1e-3", "0"]),
}
NEAR_WORDS = st.sampled_from(["gru", "tiny", "rotary", "bigrams", "adamw", "auto", "text", "é"])
WORDS = st.sampled_from(["no", "true", "null", "1e-3", "1e400", "010", "1:30", ".nan", ".inf", "30M", "tiny",
                         "gru,lstm", "[a, b]", "{a: b}", "'", '"x', "*", "&a", "!!int 3", "a # b", "٣", "1_0",
                         "lstm", "rotary", "bigrams", "muon", "", "~", "<<", "\x00", "\ud800"])  # fmt: skip


def values_near(name: str):
    """Of the type of a field, as text; of a field that is none, a word."""
    if CHOICES.get(name, [""]) != [""]:
        return st.sampled_from(CHOICES[name])
    return NEAR.get(KINDS.get(name, ""), NEAR_WORDS)


@st.composite
def assignments(draw):
    name = draw(st.sampled_from(NAMES))
    if draw(st.integers(0, 3)):
        return f"{name}={draw(values_near(name))}"
    name = draw(st.just(name) | st.text(max_size=12))
    value = draw(WORDS | WHOLE.map(str) | REAL.map(str) | st.text(max_size=12))
    return f"{name}={value}" if draw(st.integers(0, 19)) else value


@st.composite
def recipe_texts(draw):
    """YAML of sections, structured or mangled, or any text."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.text(max_size=60) | st.text("[]{}:,-&*!|>#%@'\"ab1 \n", max_size=60))
    lines = []
    strange = draw(st.integers(0, 2)) == 0
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=4, unique_by=lambda name: name.split(".")[0])):
        section, key = name.split(".")
        near = values_near(name)
        value = draw(near | WORDS | WHOLE.map(str) | REAL.map(str) | ANYTHING.map(repr) if strange else near)
        lines.append(
            f"{section}: {{{key}: {value}}}" if draw(st.booleans()) else f"{section}:\n  {key}: {value}"
        )
    text = "\n".join(lines)
    if text and draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.text(string.printable, max_size=3)) + text[at + 1 :]
    return text


def check_recipe_text(text: str | None, words: list[str], folder) -> str:
    path = None
    if text is not None:
        path = folder / "given.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(path, words)
    except UserError as error:
        one_line(error)
        return "refused"
    check_types(recipe)
    (folder / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(folder / "again.yaml") == recipe
    try:
        settings = settle(recipe)
    except UserError as error:
        one_line(error)
        return "loaded"
    settled = settings.to_recipe()
    check_types(settled)
    (folder / "again.yaml").write_text(settled.to_yaml(), encoding="utf-8")
    assert load_recipe(folder / "again.yaml") == settled
    assert settle(settled).to_recipe() == settled, "a settled recipe leaves nothing to decide"
    assert settings.architecture.num_hidden_layers == len(settings.model.mixers)
    return "settled"


def check_types(recipe: Recipe) -> None:
    for section in Recipe.model_fields:
        for _, field in getattr(recipe, section):
            for value in field.values() if isinstance(field, dict) else [field]:
                assert isinstance(value, (type(None), bool, int, float, str, list))
                if isinstance(value, float):
                    assert math.isfinite(value)
                if isinstance(value, list):
                    assert all(isinstance(item, (str, int, float)) for item in value)
            assert not isinstance(field, dict) or all(isinstance(key, str) for key in field)


# files

PACK = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".zip": lambda content: zipped(("../../x.txt", content)),
}
TEXT = st.text(max_size=30) | st.text("aé日😀\r\n \u2028\ufeff\0", max_size=30)
RECORDS = st.lists(TEXT.map(lambda text: {"text": text}), max_size=5) | st.lists(
    st.one_of(
        TEXT.map(lambda text: {"text": text}),
        ANYTHING.map(lambda value: {"text": value}),
        st.dictionaries(st.sampled_from(["text", "txt", ""]), ANYTHING, max_size=2),
        ANYTHING,
    ),
    max_size=5,
)


@st.composite
def files(draw):
    """(name, bytes on disk, whether they are as they were packed, what was packed, kind)."""
    kind = draw(st.sampled_from([".txt", ".md", ".jsonl", ".parquet"]))
    suffix = draw(st.sampled_from(list(PACK)))
    if kind == ".parquet":
        values = draw(
            st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=4)
        )
        content = parquet_of({draw(st.sampled_from(["text"] * 5 + ["t"])): values or [""]})
    elif kind == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=draw(st.booleans())) for record in draw(RECORDS)]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        content = (
            draw(TEXT).encode("utf-8", "surrogatepass")
            if draw(st.booleans())
            else draw(st.binary(max_size=60))
        )
    if draw(st.integers(0, 3)) == 0 and kind != ".parquet":
        content = mangled(draw, content)
    packed = PACK[suffix](content)
    is_whole = draw(st.integers(0, 2)) > 0
    return f"a{kind}{suffix}", packed if is_whole else mangled(draw, packed), is_whole, content, kind


def mangled(draw, content: bytes) -> bytes:
    """A byte changed, a piece cut out or put in, an end cut off, or any bytes."""
    at, stop = sorted(draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
    return draw(
        st.sampled_from(
            [
                content[:at],
                content[:at] + draw(st.binary(max_size=4)) + content[stop:],
                content[:at] + draw(st.binary(min_size=1, max_size=2)) + content[at + 1 :],
                content + draw(st.binary(max_size=9)),
                draw(st.binary(max_size=40)),
            ]
        )
    )


def check_file(name: str, packed: bytes, is_whole: bool, content: bytes, kind: str, folder) -> str:
    """Read by itself and from a folder, with both words of corpus.damaged."""
    path = folder / "data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(packed)
    (path.parent / "other.txt").write_text("other", encoding="utf-8")
    found = {}
    for damaged in ("stop", "skip"):
        for source in (path, path.parent):
            try:
                documents, report = read_documents([str(source)], CorpusRecipe(damaged=damaged))
            except UserError as error:
                one_line(error)
                continue
            found[damaged, source == path] = [d.text for d in documents if d.source != "data/other.txt"]
            assert report["documents"] == len(documents)
            assert (damaged == "skip") or not report["damaged"]["records"] + report["damaged"]["files"]
    path.unlink()
    assert ("skip", False) in found  # a damaged file never stops the reading of its folder then
    taken = {tuple(texts) for texts in found.values() if texts}
    if is_whole and kind in (".txt", ".md"):
        is_document = content.startswith(tuple(OTHER_PROGRAMS))  # of another program: refused by name
        wanted = "" if is_document else naive_text(content)
        assert taken == ({(wanted,)} if wanted else set())
    if is_whole and kind == ".jsonl":
        wanted, n_bad = naive_records(content)
        assert found["skip", False] == wanted
        assert (("stop", False) in found) == (n_bad == 0)
    if not is_whole and kind != ".parquet" and name.endswith(tuple(PACK)[1:]):
        # every compression here has a checksum: what is read is what was packed, or nothing
        assert taken <= {tuple(texts) for texts in whole_of(content, kind)}
    return "refused" if not taken else "read"


def whole_of(content: bytes, kind: str) -> list[list[str]]:
    if kind == ".jsonl":
        return [naive_records(content)[0]]
    text = naive_text(content)
    return [[text]] if text else []


def naive_text(content: bytes) -> str | None:
    try:
        return None if b"\0" in content else content.decode("utf-8") or None
    except UnicodeDecodeError:
        return None


def naive_records(content: bytes) -> tuple[list[str], int]:
    """(texts that are not empty, damaged lines) of a .jsonl file, a line at a time."""
    texts, n_bad = [], 0
    for number, line in enumerate(content.split(b"\n")):
        try:
            text = line.decode("utf-8")
            text = text.removeprefix("\ufeff") if number == 0 else text
            if not text.strip():
                continue
            value = json.loads(text)["text"]
            if value is not None:
                value.encode("utf-8")
                texts.append(value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            n_bad += 1
    return [text for text in texts if text], n_bad


# the properties, in a short form and a long one


def fuzz_configs(n: int) -> None:
    @examples(n, 0.2)
    @given(configs())
    def run(fields):
        RAN[f"config {check_config(fields)}"] += 1

    run()


def fuzz_recipes(n: int, folder) -> None:
    @examples(n, 0.25)
    @given(recipe_texts(), st.lists(assignments(), max_size=1))
    def run_texts(text, words):
        RAN[f"recipe {check_recipe_text(text, words, folder)}"] += 1

    @examples(n, 0.25)
    @given(st.lists(assignments(), max_size=3))
    def run_assignments(words):
        RAN[f"assignments {check_recipe_text(None, words, folder)}"] += 1

    run_texts()
    run_assignments()


def fuzz_files(n: int, folder) -> None:
    @examples(n, 0.3)
    @given(files())
    def run(case):
        RAN[f"file {check_file(*case, folder)}"] += 1

    run()


def test_any_config_is_right_or_refused():
    fuzz_configs(int(os.environ.get("HF_GENLM_FUZZ", SHORT)))


def test_any_recipe_is_right_or_refused(tmp_path):
    fuzz_recipes(int(os.environ.get("HF_GENLM_FUZZ", SHORT)), tmp_path)


def test_any_file_is_read_as_it_is_or_refused(tmp_path):
    fuzz_files(int(os.environ.get("HF_GENLM_FUZZ", SHORT)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["configs", "recipes", "files"])
def test_a_hundred_thousand_of_all_kinds(what, tmp_path):
    """In three parts, 100,000 in all."""
    RAN.clear()
    {"configs": lambda: fuzz_configs(LONG), "recipes": lambda: fuzz_recipes(LONG, tmp_path),
     "files": lambda: fuzz_files(LONG, tmp_path)}[what]()  # fmt: skip
    print(f"{sum(RAN.values()):,} examples: {dict(RAN)}")
    assert sum(RAN.values()) >= LONG * {"configs": 0.2, "recipes": 0.5, "files": 0.3}[what] * 0.9


def test_the_checks_see_what_they_are_there_for(tmp_path, monkeypatch):
    """With a reader that drops a record, a rounding recipe and a config without ranges, each fails."""
    with monkeypatch.context() as patch:
        patch.setattr(GenLMConfig, "_refuse_misspellings", lambda self, keys: None)
        with pytest.raises(AssertionError, match="slip"):
            check_config({**SMALL, "hiden_size": 5})

    def load_unchecked(*_):
        recipe = Recipe()
        recipe.training.__dict__["learning_rate"] = math.nan
        return recipe

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "load_recipe", load_unchecked)
        with pytest.raises(AssertionError):
            check_recipe_text(None, ["training.learning_rate=nan"], tmp_path)
    content = b'{"text": "a"}\n{"text": "b"}'
    assert check_file("a.jsonl", content, True, content, ".jsonl", tmp_path) == "read"
    with pytest.raises(AssertionError):
        check_file("a.jsonl", content[:13], True, content, ".jsonl", tmp_path)
