"""A small language model in the browser. Run `python app.py`, or push this folder as a Space."""

import logging
from pathlib import Path

for _name in ("torchao", "torch.utils._pytree"):  # their warnings about their own code, at import
    logging.getLogger(_name).setLevel(logging.ERROR)

from demo.interface import start  # noqa: E402

if __name__ == "__main__":
    start(Path(__file__).parent)
