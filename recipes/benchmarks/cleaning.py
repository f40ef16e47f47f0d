"""What scrubbing and the search for near-duplicates cost, and what is found in source code.

    python recipes/benchmarks/cleaning.py [SOURCE ...]

Processor seconds of one core over the text of the sources (nothing: CPython's library). `--show` prints each
place that a detector found, to be judged by a person.
"""

import argparse
import time

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.text.corpus import read_documents
from hf_genlm.text.duplicates import find_near_duplicates
from hf_genlm.text.scrubbing import DETECTORS, Scrubber, Tally
from hf_genlm.text.store import Documents

_AROUND = 20  # characters that `--show` prints beside a place


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    documents, _ = read_documents(options.sources, CorpusRecipe())
    n_megabytes = documents.n_bytes.sum() / 1e6
    print(f"{n_megabytes:.2f} MB, {len(documents)} documents\n\n| what | MB/s | found |\n|---|---|---|")
    for name in [*DETECTORS, "all"]:
        scrubber, tally = Scrubber(CorpusRecipe(scrub=[name])), Tally()
        scrubber.scrub("a@b.org +49 30 901820")  # imports and tables
        begun = time.process_time()
        for document in documents:
            scrubber.scrub(document.text, tally)
        seconds = time.process_time() - begun
        print(f"| {name} | {n_megabytes / seconds:.1f} | {tally.types.total()} |", flush=True)
    begun = time.process_time()
    found = find_near_duplicates(documents, documents[:0], 0.8).to_json()
    seconds = time.process_time() - begun
    print(f"| near-duplicates, 0.8 | {n_megabytes / seconds:.1f} | {found['removed']} |")
    if options.show:
        show(documents)


def show(documents: Documents) -> None:
    """Each place with what stands around it."""
    recipe = CorpusRecipe()
    for document in documents:
        text = document.text
        for name, finder in DETECTORS.items():
            for start, stop in finder(text, recipe):
                before, behind = text[max(0, start - _AROUND) : start], text[stop : stop + _AROUND]
                print(f"{name}\t{document.source}\t{before!r} {text[start:stop]!r} {behind!r}")


if __name__ == "__main__":
    main()
