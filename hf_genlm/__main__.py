"""`python -m hf_genlm` is `hf-genlm`; it is also what a launcher of processes can start."""

import os
import sys

# Python imports from the current folder first, where a random.py or token.py of the user may lie
is_safe = getattr(sys.flags, "safe_path", False)
if not is_safe and sys.path[:1] == [os.getcwd()] and not os.path.isdir("hf_genlm"):
    del sys.path[0]

from hf_genlm.cli.main import main  # noqa: E402

sys.exit(main())
