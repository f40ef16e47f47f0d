"""Promise: processes of one machine sum through its memory, all alike, or learn that they cannot."""

import subprocess
import sys

from support import summing
from support.launching import START, TIMEOUT_S, environment


def test_processes_sum_alike_in_shared_memory():
    done = subprocess.run(
        [sys.executable, "-c", START, "3", summing.__file__], capture_output=True, text=True,
        env=environment(), timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["lost", "lost", "(0, None)"], done.stderr
