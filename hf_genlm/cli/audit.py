"""`hf-genlm audit`: attack a model and report what it reveals of its training text."""

import argparse
import json

from hf_genlm.cli.display import Display, table


def run(options: argparse.Namespace) -> None:
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.card.privacy import LIMITS, describe_audit
        from hf_genlm.privacy.audit import audit
        from hf_genlm.report.audit_plot import write_audit_figure
        from hf_genlm.run_folder import RunFolder

        result = audit(
            options.model,
            train=options.train or (),
            held_out=options.held_out or (),
            attacks=options.attacks,
            reference=options.reference,
            limit=options.limit,
            seed=options.seed,
            output_dir=options.out,
            recipe=options.recipe,
            assignments=options.assignments,
            listener=display.hear,
        )
        picture = None
        if result.path is not None:
            display.show("drawing")
            folder = RunFolder(result.path.parent)
            is_own = not options.out and folder.model.is_dir()  # else the folder is not the run's
            picture = write_audit_figure(
                folder.path, result.measurements, result.roc_curves, folder.model if is_own else None
            )
            if is_own:
                from hf_genlm.card import write_card

                write_card(folder)
    if options.json:
        print(json.dumps({"measurements": [m.to_json() for m in result.measurements]}, indent=2))
        return
    print(table(result.measurements))
    print("\n" + "\n".join([*describe_audit(result.measurements, result.guarantee), LIMITS]))
    if result.path is not None:
        print(f"\naudit:    {result.path}" + (f"\npicture:  {picture}" if picture else ""))
