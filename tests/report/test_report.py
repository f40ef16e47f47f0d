"""Promise: a report says the same in HTML and in Markdown, stands alone, and takes any words."""

import base64
import re
from html.parser import HTMLParser

import pytest

from hf_genlm.report.document import Code, Heading, Lead, Picture, Table, Text, write_report
from hf_genlm.report.figures import line_style, new_figure, save_png

pytestmark = pytest.mark.usefixtures("drawn")


class Reader(HTMLParser):
    """The words and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.words, self.addresses = [], []

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href")]


def draw(path):
    figure, axes = new_figure()
    for index in range(3):
        axes.plot([1, 2, 3], [index, index + 1, index], label=f"series {index}", **line_style(index))
    return save_png(figure, path)


def test_a_report_stands_alone_and_says_the_same_twice(tmp_path):
    picture = draw(tmp_path / "plots" / "one.png")
    hostile = "<script>alert('a|b')</script> & *stars*"
    blocks = [
        Heading("Which one"),
        Lead("1.25 is least"),
        Text(hostile),
        Table(
            ["decoder", "bits"],
            [["lstm", "1.5"], [hostile, "1.25"]],
            caption="Lower is better.",
            best=frozenset({1}),
        ),
        Picture(picture, "loss against time", "The loss."),
        Code("hf-genlm train x", "bash"),
    ]
    html, plain = write_report(tmp_path, "A <b> report", blocks)
    page = html.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    text = " ".join(reader.words)
    for words in (
        "A <b> report",
        "Which one",
        "1.25 is least",
        hostile,
        "lstm",
        "1.25",
        "The loss.",
        "hf-genlm train x",
    ):
        assert words in text
    assert "<script" not in page
    (address,) = reader.addresses
    assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    markdown = plain.read_text(encoding="utf-8")
    assert "](plots/one.png)" in markdown
    assert "**1.25 is least**" in markdown
    assert "| lstm | 1.5 |" in markdown, "a number in a cell stays as it is"
    rows = re.findall(r"^\|.*\|$", markdown, flags=re.MULTILINE)
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3, 3]
    assert "<script>" not in markdown


def test_a_report_has_a_dark_mode_in_which_every_color_changes(tmp_path):
    html, _ = write_report(tmp_path, "x", [Text("y")])
    style = re.search(r"<style>(.*?)</style>", html.read_text(), re.DOTALL).group(1)
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w+)", rule))
        for rule in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    assert set(light) == set(dark)
    assert not [name for name in light if light[name] == dark[name]]
    rest = re.sub(r":root \{.*?\}", "", style, flags=re.DOTALL)
    assert set(re.findall(r"#\w+", rest)) == {"#fff"}, "the ground of pictures, which are drawn for it"


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    assert draw(tmp_path / "a.png").read_bytes() == draw(tmp_path / "b.png").read_bytes()
