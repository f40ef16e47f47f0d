"""`hf-genlm train`: one process, or several that this one launches or is one of."""

import argparse
import shlex
import time

from hf_genlm.card import check_card
from hf_genlm.cli.arguments import TRAIN_FIELDS
from hf_genlm.cli.display import Display, table
from hf_genlm.cli.launch import check_processes, complain, is_first, is_launched, launch, use_one_gpu
from hf_genlm.cli.recipes import recipe_of
from hf_genlm.config.recipe import Recipe
from hf_genlm.errors import Stopped, UserError


def run(options: argparse.Namespace) -> int:
    recipe = recipe_of(options, TRAIN_FIELDS)
    check_card(recipe.card)
    if options.resume and not options.out:
        raise UserError("--resume goes on with a run: name its folder by --out DIR")
    out = (
        options.out
        or f"runs/{'mixed' if recipe.model.mixers else recipe.model.decoder}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    check_processes(options.processes)
    if is_launched():
        return _as_one_of_several(recipe, out, options.resume)
    if options.processes == 1:
        use_one_gpu()
    elif options.processes is not None:
        return _by_several(options, out)
    _train_and_tell(recipe, out, options.resume)
    return 0


def _by_several(options: argparse.Namespace, out: str) -> int:
    from hf_genlm.run_folder import RunFolder

    try:
        code, message = launch(["-m", "hf_genlm", *options.arguments, "--out", out], options.processes)
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    if code > 128 and RunFolder(out).has_stopped():  # the first process has said how to go on
        return 0
    if message is not None:
        complain(message)
    return code


def _as_one_of_several(recipe: Recipe, out: str, resume: bool) -> int:
    from hf_genlm.training.processes import LostProcess, leave, noticing_losses

    try:
        with noticing_losses():
            if is_first():
                _train_and_tell(recipe, out, resume)
            else:
                from hf_genlm.training.train import train

                train(recipe, out, resume=resume)
            leave()
    except LostProcess:
        return 1  # the launcher says which one it was
    return 0


def _train_and_tell(recipe: Recipe, out: str, resume: bool) -> None:
    from hf_genlm.evaluation.measurement import read_measurements

    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.card import write_card
        from hf_genlm.files import read_json
        from hf_genlm.report.curves import write_curves
        from hf_genlm.run_folder import RunFolder
        from hf_genlm.training.train import train

        try:
            run = train(recipe, out, display.hear, resume)
        except Stopped:
            write_curves(RunFolder(out))
            raise
        display.show("drawing")
        write_curves(run)
        write_card(run)
    print(table(read_measurements(run.evaluation)))
    print(f"\nmodel:  {run.model}\ncard:   {run.model / 'README.md'}")
    if run.privacy.is_file():
        said = read_json(run.privacy)
        print(f"privacy: epsilon {said['epsilon']:g}, delta {said['delta']:g}, for {said['unit']}")
    print()
    print(f"hf-genlm generate {shlex.quote(str(run.path))}\n")
    print("from transformers import AutoModelForCausalLM\nimport hf_genlm")
    print(f'model = AutoModelForCausalLM.from_pretrained("{run.model.as_posix()}")')
