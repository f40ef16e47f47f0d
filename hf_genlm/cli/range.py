"""`hf-genlm range`: which decoder remembers how far, by training small ones on synthetic recall tasks."""

import argparse

from hf_genlm.cli.display import Display


def run(options: argparse.Namespace) -> None:
    from hf_genlm.long_range import measure_range

    with Display() as display:
        display.show("loading torch and transformers")
        found = measure_range(
            options.out,
            decoders=options.decoders.split(","),
            tasks=options.tasks.split(","),
            pairs=options.pairs,
            lengths=options.lengths,
            steps=options.steps,
            minutes=options.minutes,
            seeds=options.seeds,
            learning_rates=options.rates,
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            listener=display.hear,
        )
    for sentence in found.sentences:
        print(sentence)
    print(f"\nreport:  {found.html}\n         {found.markdown}")
