"""Training curves, plots, and reports in HTML and Markdown.

`plot(runs)` draws the curves of one or several runs; `write_curves(run)` writes them into the run folder.
"""

from hf_genlm.report.curves import plot, read_curves, write_curves

__all__ = ["plot", "read_curves", "write_curves"]
