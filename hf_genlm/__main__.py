"""`python -m hf_genlm` is `hf-genlm`; it is also what a launcher of processes can start."""

import sys

from hf_genlm.cli.main import main

sys.exit(main())
