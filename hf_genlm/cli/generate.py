"""`hf-genlm generate`: continue a prompt."""

import argparse

from hf_genlm.cli.display import Display
from hf_genlm.loading import load, source_of


def run(options: argparse.Namespace) -> None:
    source_of(options.model)  # before the wait for torch
    with Display() as display:
        display.show("loading torch and transformers")
        model, tokenizer = load(options.model)
    import torch
    from transformers import TextStreamer

    from hf_genlm.decoding import FastGenerator

    fast = FastGenerator(model, program="compiled" if options.compile else None, int8=options.int8)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    ids = tokenizer(options.prompt, add_special_tokens=False).input_ids
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = torch.tensor([start + ids], device=model.device)
    sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    fast.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(sampling if options.temperature > 0 else {"do_sample": False}),
    )
