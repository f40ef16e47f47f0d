"""Promise: what others wrote (names, listings, messages, generated text, every string of every file of a run)
neither steers a terminal nor is syntax of a page."""

import dataclasses
import json
import re
import sys
import typing
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from support.cards import make_run

from hf_genlm.card.card import render_card
from hf_genlm.cli import display
from hf_genlm.cli.display import Display, print_generated, print_rows, say
from hf_genlm.cli.main import main
from hf_genlm.errors import UserError, escape_controls, is_control
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.files import write_json
from hf_genlm.report.document import Code, Heading, Lead, Table, Text, write_report
from hf_genlm.run import list_runs
from hf_genlm.run_schemas import (
    CorpusFile,
    EnvironmentFile,
    GuaranteeFile,
    MeasurementRecord,
    ModelConfigFile,
    VectorsFile,
)

# a title of the window, colours, a link of a terminal, C1, bidi overrides and isolates, line ends, tags
STEERING = [
    "\x1b]0;owned\x07", "\x1b[2J\x1b[31m", "\x1b]8;;http://evil.example\x1b\\x", "\x9b31m", "\x90q", "\r",
    "\x08", "\x7f", "\n", "\u2028", "\u2029", "\x85", "\u202e", "\u202a", "\u2066", "\u2069", "\u200e",
    "\u061c", "\ufeff", "\u200b", "\U000e0041",
]  # fmt: skip
SYNTAX = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>![p](http://evil.example/p.png)[l](javascript:alert(3))"
    "</code></pre></details>\"'` | x | `a` ```\n---\nlicense: mit\n---\n# h\n{{ 7*7 }}${7*7}&lt;b&gt;<!-- --><http://evil.example/a>"
)
HOSTILE = "v" + SYNTAX + "".join(STEERING) + "w"
MARKUP = "[red]x[/red] [link=http://evil.example]y[/link] :smile:"


def controls_in(text: str, but: str = "\n") -> list[str]:
    return [c for c in text if is_control(c) and c not in but]


def hostile_of(kind: typing.Any) -> typing.Any:
    """A value of a type of a schema, every string in it hostile."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=False)
        return {f.name: hostile_of(hints[f.name]) for f in dataclasses.fields(kind)}
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return [hostile_of(inner[0])]
    if origin is tuple:
        return [hostile_of(each) for each in inner]
    if origin is dict:
        return {hostile_of(inner[0]): hostile_of(inner[1])}
    if inner:  # a union: the richest part
        parts = [part for part in inner if part is not type(None)]
        return hostile_of(parts[0])
    return {str: HOSTILE, int: 3, float: 0.5, bool: False}.get(kind, {HOSTILE: HOSTILE})


def hostile_run(path: Path):
    run = make_run(path, samples=f"# 1\n\n````text\n{HOSTILE}\n````\n")
    corpus = hostile_of(CorpusFile)
    corpus["canaries"]["planted_by_repetitions"] = {"1": 3}
    corpus["files"].append({**corpus["files"][0], "bytes": None})  # a data set of the Hub
    corpus["languages"] = {HOSTILE: corpus["languages"][HOSTILE]}
    write_json(run.corpus, corpus)
    write_json(run.environment, hostile_of(EnvironmentFile))
    write_json(run.vectors, hostile_of(VectorsFile))
    write_json(run.privacy, hostile_of(GuaranteeFile))
    config = json.loads((run.model / "config.json").read_text())
    write_json(run.model / "config.json", {**config, **hostile_of(ModelConfigFile)})
    record = hostile_of(MeasurementRecord)
    write_json(run.evaluation, {"measurements": [record, {**record, "name": "bits_per_byte"}]})
    write_measurements(
        run.languages, [Measurement(f"whole_characters/{HOSTILE}", 0.5, HOSTILE, 3, None, HOSTILE, True)]
    )
    attacks = ("exposure/1", "exposure_p_value/1", "extraction_5_tokens/prefix_5", f"x/{HOSTILE}")
    write_json(run.audit, {"measurements": [{**record, "name": attack} for attack in attacks]})
    run.log("sample", step=1, text=HOSTILE, elapsed_s=1.0)
    run.log("sample", step=2, text=HOSTILE, elapsed_s=2.0)
    run.log("started", base_model=HOSTILE)
    return run


def links_of(tokens) -> list[str]:
    found = []
    for token in tokens:
        found += [value for name, value in token.attrs.items() if name in ("href", "src")]
        found += links_of(token.children or [])
    return found


def html_of(tokens) -> list[str]:
    found = [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    return found + [each for token in tokens for each in html_of(token.children or [])]


def check_page(text: str) -> None:
    """No control character, no HTML but ours, no link or picture of a stranger, intact front matter."""
    assert controls_in(text, "\n\t") == []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    allowed = (
        r"</?(code|details|summary)>|<summary>.*</summary>|<!-- hf-genlm card; .*-->|<details>\n<summary>.*"
    )
    assert [html for html in html_of(tokens) if not re.fullmatch(allowed, html.strip())] == []
    own = r"plots/\w+\.png|https://huggingface\.co/datasets/[\w.%!#$&+,/:;=?@~-]*"
    assert [link for link in links_of(tokens) if not re.fullmatch(own, link)] == []


def test_no_string_of_a_file_of_a_run_is_syntax_on_its_card(tmp_path):
    """Every string field of every schema that the card reads."""
    text = render_card(hostile_run(tmp_path))
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    check_page(body)
    assert controls_in(front) == []
    data = yaml.safe_load(front)
    assert data["library_name"] == "transformers"
    assert "license" not in data
    assert "## Limits and risks" in body
    headings = [
        line for line in re.sub(r"(?ms)^(`{3,}).*?^\1$", "", body).splitlines() if line.startswith("#")
    ]
    assert [line for line in headings if line in ("# h", "#h")] == []


def test_nor_is_the_name_of_a_run(tmp_path):
    name = "v" + HOSTILE.replace("/", "")[:120] + "\x1b[31m\u202e"
    check_page(render_card(make_run(tmp_path, name=name)).split("\n---\n", 1)[1])


@pytest.mark.parametrize("block", [Heading, Lead, Text, Code])
def test_reports_escape_every_value(block, tmp_path):
    blocks = [block(HOSTILE), Table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]] * 2, HOSTILE, frozenset({1}))]
    html, markdown = write_report(tmp_path, HOSTILE, blocks)
    check_page(markdown.read_text())
    page = html.read_text()
    assert controls_in(page) == []
    assert "<script" not in page
    assert "<img" not in page
    assert "javascript:" not in re.sub(r">[^<]*<", "><", page), "as text only"


def check_terminal(text: str, lines: int) -> None:
    assert controls_in(text) == []
    assert text.count("\n") == lines


@pytest.mark.parametrize("steering", STEERING, ids=ascii)
def test_names_in_lines_tables_and_messages_are_escaped(steering, capsys):
    name = f"a{steering}b"
    say(f"file {name}", name)
    print_rows([(name, "1")], (("name"), "n"))
    say(str(UserError(f"{name!s} is missing")), is_error=True)
    shown = capsys.readouterr()
    check_terminal(shown.out, lines=4)
    check_terminal(shown.err, lines=1)
    assert escape_controls(name) in shown.out


def test_markup_is_text(capsys):
    say(MARKUP)
    print_rows([(MARKUP, "1")])
    with Display() as shown:
        shown.show(MARKUP)
        shown.hear("note", {"message": MARKUP})
        shown.hear("progress", {"task": MARKUP, "done": 1, "total": 2})
    printed = capsys.readouterr()
    assert printed.out.count(MARKUP) == 2
    assert MARKUP in printed.err


COUNTS = {"documents": 1, "bytes": 2}
EVENTS = {
    "note": {"message": HOSTILE},
    "corpus": {"description": HOSTILE, "train": COUNTS, "validation": COUNTS},
    "languages": {"languages": {HOSTILE: {"train": {"bytes": 1}, "validation": {"bytes": 1}, "repeats": 1}}},
    "sample": {"step": 1, "text": HOSTILE},
    "milestone": {"step": 1, "words": 2, "folder": HOSTILE},
    "run": {"run": HOSTILE, "number": 1, "of": 2},
    "kept": {"run": HOSTILE, "number": 1, "of": 2},
    "finished": {"run": HOSTILE, "bits_per_byte": 1.0},
    "failed": {"run": HOSTILE, "reason": HOSTILE},
    "measured": {"place": HOSTILE, "run": HOSTILE, "accuracy": 1.0, "size": HOSTILE, "seconds": 1.0},
    "progress": {"task": HOSTILE, "done": 1, "total": 2},
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_events_of_a_run_are_escaped(event, is_terminal, monkeypatch, capsys):
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Display() as shown:
        shown.hear(event, EVENTS[event])
        shown.bar.refresh()
    printed = capsys.readouterr().err
    ours = re.sub(r"\x1b\[[0-9;?]*[mKAlhG]|\r", "", printed)  # of rich's own bar and colours
    assert controls_in(ours) == []
    assert "\x1b[2J" not in printed
    assert "\x1b[31m" not in printed.replace("\x1b[31m\\", "")


@pytest.mark.parametrize("verb", ["runs", "card", "plot", "generate", "evaluate"])
def test_hostile_folder_names_on_the_command_line(verb, tmp_path, capsys):
    folder = tmp_path / "a\x1b[31mb\u202ec\rd\ne[red]"
    folder.mkdir()
    make_run(folder, name="r\x1b]0;t\x07un")
    target = folder if verb == "runs" else next(folder.iterdir()) / "missing"
    main([verb, str(target)])
    printed = capsys.readouterr()
    assert controls_in(printed.out + printed.err) == []
    assert "\\x1b" in printed.out + printed.err
    assert list_runs(folder)[0].path.endswith("r\x1b]0;t\x07un")


def test_generated_text_is_exact_for_a_program_and_escaped_on_a_terminal(capsys, monkeypatch):
    text = "one\n\ttwo\x1b[31m\u202e\r é\u200d語"
    print_generated(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_generated(text)
    assert capsys.readouterr().out == "one\n\ttwo\\x1b[31m\\u202e\\r é\u200d語"


def test_the_traceback_of_a_fault_is_escaped(capsys):
    try:
        raise RuntimeError("a\x1b[31m\u202eb")
    except RuntimeError as error:
        display.print_traceback(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert controls_in(shown) == []
    assert "RuntimeError: a\\x1b[31m\\u202eb" in shown


def test_letters_of_every_script_stay_as_they_are():
    text = "é ñ 語 한 हिन्दी \u0645\u06cc\u200c\u062e\u0648 👩\u200d🚀 \u00a0\u3000 co\u00adop"
    assert escape_controls(text) == text
