"""Memory does not grow with the text: it is read, split, encoded and packed a part at a time."""

import ctypes
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

# getrusage would count what the parent of a process had before it
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")

BENCHMARK = Path(__file__).parents[2] / "recipes/benchmarks/data_path.py"

# The data path from a file to rows, with a stand-in for the engines, which see a batch at a time: an id for
# each character, twice as large as the text. Prints the peak in MB. The last argument plants a fault.
SCRIPT = """
import re, sys, types
source, fault = sys.argv[1:]
import hf_genlm.cli  # the rooms of text alone, not our model
import numpy as np
from tokenizers import Tokenizer, models
from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.text import encoding
from hf_genlm.text.cache import ArrayFile
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.packing import PackedRows
from hf_genlm.text.store import TextStore
from hf_genlm.text.tokenizer import pre_tokenizer, sample_evenly

TextStore.max_in_memory = 10**9 if fault == "text is held" else 1 << 20
if fault == "ids are held":
    ArrayFile.release = lambda self: None
encoding.Encoder.encode = lambda self, texts, pool: [np.full(len(text), 9, self.dtype) for text in texts]
backend = Tokenizer(models.BPE())
backend.pre_tokenizer = pre_tokenizer()
corpus = read_corpus(CorpusRecipe(sources=[source]))
assert sum(map(len, sample_evenly(corpus.train, 10**6))) <= 10**6
ids = encoding.encode_documents(types.SimpleNamespace(backend_tokenizer=backend), corpus.train)
rows = PackedRows(ids, 2048, 0, 1)
assert rows.n_targets > corpus.report["train"]["characters"]
for start in range(0, len(rows) - 8, 8):
    rows.__getitems__(range(start, start + 8))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""
TEXT = "".join(f"value_{k * k} = other(item, {k}) + 'é'\n" for k in range(2000))


def peak_mb(tmp_path: Path, megabytes: int, kind: str, fault: str = "") -> int:
    path = tmp_path / f"{megabytes}.{kind}"
    text = TEXT if kind == "txt" else TEXT[:2000]
    with path.open("w", encoding="utf-8") as file:
        for i in range(megabytes * 10**6 // len(text)):
            file.write(text if kind == "txt" else json.dumps({"text": f"{i} {text}"}) + "\n")
    command = [sys.executable, "-c", SCRIPT, str(path), fault]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path.unlink()
    return int(done.stdout)


@pytest.mark.parametrize(
    ("kind", "fault", "least", "most"),
    [
        ("txt", "", -25, 25),
        pytest.param("jsonl", "", -25, 25, marks=pytest.mark.slow),
        pytest.param("txt", "text is held", 35, 1000, marks=pytest.mark.slow),
        ("txt", "ids are held", 35, 1000),
    ],
)
def test_a_longer_text_takes_no_more_memory(tmp_path, kind, fault, least, most):
    """Between 10 and 70 MB of text; and the measure sees what it is for."""
    assert least < peak_mb(tmp_path, 70, kind, fault) - peak_mb(tmp_path, 10, kind, fault) < most


HELD = """
import ctypes
import resource
import sys
import torch
import hf_genlm.cli  # torch alone, not our model
from hf_genlm.memory import keeping_memory

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "mapped",
                                                      "usmblks", "fsmblks", "used", "free", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = MallInfo

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20  # MB

def step():
    before, resident_before = mallinfo().mapped, resident()
    tensor = torch.zeros(1 << 24).add_(1)  # 64 MB
    mapped = mallinfo().mapped - before
    del tensor
    print(mapped >> 20, resident() - resident_before)

torch.zeros(1 << 20).add_(1)
step()
with keeping_memory():
    step()
step()
"""


def test_freed_memory_is_kept_inside_and_given_back_after():
    """64 MB are mapped anew by the system, or lie in the process's own heap, also when they are free."""
    if platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("only glibc can be told to keep memory, and says since 2.33 what it keeps")
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    print(done.stdout)
    outside, inside, afterwards = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert outside[0] == afterwards[0] == 64
    assert inside[0] == 0
    assert outside[1] < 32 < inside[1]
    assert afterwards[1] < 32


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--records"]])
def test_a_gigabyte_trains_in_one_and_a_half(options):
    """A whole run, imports and the first steps of training included."""
    command = [sys.executable, str(BENCHMARK), "--memory-mb", "1000", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(found.replace(",", "")) for found in re.findall(r"peak memory ([\d,]+) MB", done.stdout)]
    assert len(peaks) == 2
    assert max(peaks) < 1500
