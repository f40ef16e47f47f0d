"""`hf-genlm space`: a demo in the browser, to run here or to push as a Hugging Face Space."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hf_genlm.errors import UserError

DEFAULT_PORT = 7860


def run(options: argparse.Namespace) -> int:
    from hf_genlm.space.build import shown_model, write_space

    repo_ids = _one_for_each(options.models, options.repo_ids)
    if options.out is None and not options.run:
        raise UserError("say where the demo goes, --out DIR, or run it at once, --run")
    if options.port is not None and not options.run:
        raise UserError(f"--port {options.port} is where the demo is served: add --run")
    models = [shown_model(name, repo_id) for name, repo_id in zip(options.models, repo_ids, strict=True)]
    with tempfile.TemporaryDirectory() as aside:
        out = Path(options.out or Path(aside) / "space")
        files = write_space(out, models, options.title)
        if options.out is not None:
            _say(out, files)
        return _serve(out, options.port or DEFAULT_PORT) if options.run else 0


def _one_for_each(models: Sequence[str], repo_ids: Sequence[str]) -> Sequence[str | None]:
    """The id of each model, or none at all."""
    if len(models) > 2:
        raise UserError(f"the demo shows one model or two side by side, not {len(models)}")
    if repo_ids and len(repo_ids) != len(models):
        raise UserError(f"--repo-id is given {len(repo_ids)} times for {len(models)} models: once for each")
    return repo_ids or [None] * len(models)


def _say(out: Path, files: Sequence[Path]) -> None:
    """What was written, which is all that a push would send, and the commands that run and push it."""
    for path in files:
        print(f"{path.stat().st_size:>12,}  {path.relative_to(out).as_posix()}")
    print(f"{sum(path.stat().st_size for path in files):>12,}  bytes in {out}\n")
    print(f"python {out / 'app.py'}  # runs it here\n")
    print("# as a Space, every file above goes to the Hub:")
    print("hf repos create OWNER/SPACE --type space --space-sdk gradio")
    print(f"hf upload OWNER/SPACE {out} . --type space")


def _serve(out: Path, port: int) -> int:
    """Run the demo until Ctrl-C, in a process of its own, which has nothing of this package."""
    print(f"serving on http://127.0.0.1:{port}, once the models are loaded; Ctrl-C ends it", flush=True)
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port)}
    return subprocess.run([sys.executable, str(out / "app.py")], env=environment, check=False).returncode
