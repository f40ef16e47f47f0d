"""`hf-genlm push`: publish a model on the Hub, and prove that it loads from there."""

import argparse
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_genlm.cli.display import Display
from hf_genlm.errors import UserError

if TYPE_CHECKING:
    from hf_genlm.hub.manifest import Leaving
    from hf_genlm.hub.push import Content, Hub


def run(options: argparse.Namespace) -> None:
    from hf_genlm.card.card import write_card
    from hf_genlm.hub.errors import PushFailed, telling_retries
    from hf_genlm.hub.manifest import check
    from hf_genlm.hub.parcel import Parcel, contents, milestone_contents
    from hf_genlm.hub.push import Hub, check_names

    check_names(options.repo_id, options.tag)
    parcel = Parcel.of(options.path)
    milestones = parcel.milestones() if options.branches else []
    if parcel.run is not None and not options.keep_card:
        write_card(parcel.run, options.repo_id)
    leaving = parcel.inspect()
    along = [milestone.inspect() for milestone in milestones]
    _show([leaving, *along])
    check([leaving, *along], options.allow)
    if options.dry_run:
        print("nothing was sent")
        return
    branches = {other.folder.name: milestone_contents(other, options.repo_id) for other in along}
    with Display() as display:
        display.show("asking the Hub")
        hub = Hub(options.repo_id, note=lambda message: display.note([message]))
        try:
            with telling_retries(hub.note):
                _push(hub, display, contents(leaving), branches, options)
        except PushFailed as error:
            raise UserError(f"{error}; to go on, give the same command: {_command(options)}") from error


def _push(
    hub: "Hub",
    display: Display,
    files: "Mapping[str, Content]",
    branches: "Mapping[str, Mapping[str, Content]]",
    options: argparse.Namespace,
) -> None:
    from hf_genlm.hub.push import size_of

    hub.open(options.private)
    n_bytes = sum(size_of(content) for content in files.values())
    display.show(f"uploading {len(files)} files, {n_bytes:,} bytes")
    commit = hub.push(files, "Model pushed by hf_genlm", tag=options.tag)
    display.show("loading it from the Hub, in a clean process")
    hub.prove(commit, files)
    tag = hub.tag(commit, options.tag)
    for name, content in branches.items():
        display.show(f"uploading {name}")
        hub.make_branch(name, commit)
        hub.push(content, f"Model {name} pushed by hf_genlm", branch=name)
    display.bar.stop()
    print(f"pushed: {hub.url}\ncommit: {commit}\ntag:    {tag}")
    for name in branches:
        print(f"branch: {name}")
    print("read back: every file as it was sent; it generates in a process without hf_genlm\n")
    print("from transformers import AutoModelForCausalLM")
    print(
        f'model = AutoModelForCausalLM.from_pretrained("{options.repo_id}", revision="{tag}", '
        "trust_remote_code=True)"
    )


def _show(leaving: "list[Leaving]") -> None:
    """Every file that leaves, with its size, and what they come to."""
    for each in leaving:
        print(f"{each.folder}:")
        for name, size in each.sizes.items():
            print(f"  {size:>14,}  {name}")
        print(f"  {sum(each.sizes.values()):>14,}  bytes in {len(each.sizes)} files\n")


def _command(options: argparse.Namespace) -> str:
    words = ["hf-genlm", "push", options.path, options.repo_id]
    words += [
        f"--{name.replace('_', '-')}" for name in ("private", "branches", "keep_card") if vars(options)[name]
    ]
    words += ["--tag", options.tag] if options.tag else []
    words += [word for entry in options.allow for word in ("--allow", entry)]
    return shlex.join(words)
