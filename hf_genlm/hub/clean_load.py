"""Run in a process of its own after a push: download a model by its Hub id, hash its files, and generate.

    python -c "$(cat clean_load.py)" REPO_ID REVISION

As on a machine where this package was never installed: the code beside the weights has to do. Prints one line
of JSON: the sha256 of every file, the module that the model's class comes from, and how many tokens it wrote.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

N_TOKENS = 8


def load(repo_id: str, revision: str) -> dict[str, object]:
    """What is printed."""
    sys.modules["hf_genlm"] = None  # type: ignore[assignment]  # whoever imports it fails
    import torch
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(snapshot_download(repo_id, revision=revision))
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    model: Any = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
    if "tokenizer_config.json" in files:
        AutoTokenizer.from_pretrained(repo_id, revision=revision, trust_remote_code=True)  # or it asks
    prompt = torch.tensor([[model.config.bos_token_id or 0]])
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=N_TOKENS, do_sample=False
    )
    return {"files": files, "module": type(model).__module__, "n_tokens": written.shape[1] - 1}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(load(*sys.argv[1:])) + "\n")
