"""`hf-genlm push`: publish a model on the Hub, and check that it loads from there."""

import argparse
import shlex
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hf_genlm.cli.display import Display
from hf_genlm.errors import UserError

if TYPE_CHECKING:
    from hf_genlm.hub.manifest import Manifest


def run(options: argparse.Namespace) -> None:
    from hf_genlm.hub.push import PushFailed, push

    display, is_shown = Display(), False
    with ExitStack() as stack:

        def hear(event: str, fields: dict[str, Any]) -> None:
            nonlocal is_shown
            if event == "manifest":
                _print_manifest(fields["manifest"])
                return
            if not is_shown:
                stack.enter_context(display)
                is_shown = True
            display.hear(event, fields)

        try:
            result = push(
                options.path,
                options.repo_id,
                private=options.private,
                tag=options.tag,
                branches=options.branches,
                keep_card=options.keep_card,
                allow=options.allow,
                dry_run=options.dry_run,
                listener=hear,
            )
        except PushFailed as error:
            raise UserError(f"{error}: {shlex.join(['hf-genlm', *options.arguments])}") from error
    if result.commit is None:
        print("nothing was sent")
        return
    print(f"pushed: {result.url}\ncommit: {result.commit}\ntag:    {result.tag}")
    for name in result.branches:
        print(f"branch: {name}")
    print("read back: every file as it was sent; it generates in a process without hf_genlm\n")
    print("from transformers import AutoModelForCausalLM")
    print(
        f'model = AutoModelForCausalLM.from_pretrained("{result.repo_id}", revision="{result.tag}", '
        "trust_remote_code=True)"
    )


def _print_manifest(manifest: "Manifest") -> None:
    """Print each file with its size, and the total."""
    print(f"{manifest.folder}:")
    for name, size in manifest.sizes.items():
        print(f"  {size:>14,}  {name}")
    print(f"  {manifest.num_bytes:>14,}  bytes in {len(manifest.sizes)} files\n")
