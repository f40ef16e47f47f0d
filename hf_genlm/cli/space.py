"""`hf-genlm space`: a browser demo, to run here or to push as a Hugging Face Space."""

import argparse
import shlex
import tempfile
from pathlib import Path

from hf_genlm.errors import UserError


def run(options: argparse.Namespace) -> int:
    from hf_genlm.space.build import DEFAULT_PORT, build_space, run_space

    if options.out is None and not options.run:
        raise UserError("say where the demo goes, --out DIR, or run it at once, --run")
    if options.port is not None and not options.run:
        raise UserError(f"--port {options.port} is where the demo is served: add --run")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(options.out or Path(temporary) / "space")
        space = build_space(options.models, out, repo_ids=options.repo_ids, title=options.title)
        if options.out is not None:
            for name, size in space.sizes.items():
                print(f"{size:>12,}  {name}")
            print(f"{sum(space.sizes.values()):>12,}  bytes in {out}\n")
            print(f"python {shlex.quote(str(out / 'app.py'))}  # runs it here\n")
            print("# as a Space, every file above goes to the Hub:")
            print("\n".join(space.push_commands))
        if not options.run:
            return 0
        port = options.port or DEFAULT_PORT
        print(f"serving on http://127.0.0.1:{port}, once the models are loaded; Ctrl-C ends it", flush=True)
        return run_space(out, port)
