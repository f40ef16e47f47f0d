"""`hf-genlm serve`, and `chat` with a server."""

import argparse

from hf_genlm.loading import source_of


def serve_model(options: argparse.Namespace) -> None:
    from hf_genlm.serving import serve

    serve(source_of(options.model), options.rest)


def chat_with_model(options: argparse.Namespace) -> None:
    from hf_genlm.serving import chat

    chat(source_of(options.model), options.url, options.rest)
