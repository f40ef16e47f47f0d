"""Helpers shared by tests: pictures.

Half of the time of a small run would go into drawing its curves, and few tests look at them: a picture is one
pixel, unless a test asks for `drawn`. What is drawn is composed all the same.
"""

from typing import BinaryIO
from unittest import mock

import pytest
from matplotlib.figure import Figure
from PIL import Image

SAVE = Figure.savefig


def write_pixel(figure: Figure, file: BinaryIO, **_: object) -> None:
    Image.new("L", (1, 1)).save(file, "PNG")


@pytest.fixture(scope="session", autouse=True)
def pictures_of_one_pixel():
    with mock.patch.object(Figure, "savefig", write_pixel):
        yield


@pytest.fixture(scope="module")
def drawn():
    with mock.patch.object(Figure, "savefig", SAVE):
        yield
