"""A small language model in the browser: `python app.py`, or this folder pushed as a Space."""

from pathlib import Path

from demo.interface import start

if __name__ == "__main__":
    start(Path(__file__).parent)
