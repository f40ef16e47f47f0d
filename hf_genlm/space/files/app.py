"""A small language model in the browser. Run `python app.py`, or push this folder as a Space."""

from pathlib import Path

from demo.interface import start

if __name__ == "__main__":
    start(Path(__file__).parent)
