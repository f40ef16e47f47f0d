"""Helpers shared by tests: corpora."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import read_corpus, read_documents


def read(*sources, **fields):
    return read_documents([str(s) for s in sources], CorpusRecipe(**fields))


def corpus_of(*sources, **fields):
    return read_corpus(CorpusRecipe(sources=[str(s) for s in sources], **fields))


def texts(documents):
    return [document.text for document in documents]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def zipped(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(*members: tuple[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def parquet_of(columns: dict) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


def complaint(*sources, **fields) -> str:
    with pytest.raises(UserError) as caught:
        corpus_of(*sources, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": lambda content: zipped(("../../outside.txt", content)),
}
