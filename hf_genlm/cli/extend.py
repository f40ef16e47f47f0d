"""`hf-genlm extend`: a trained model with tokens for another language, to be trained on."""

import argparse
import json
from pathlib import Path

from hf_genlm.cli.arguments import SOURCE_FIELD
from hf_genlm.cli.display import Display
from hf_genlm.cli.recipes import recipe_of
from hf_genlm.errors import UserError
from hf_genlm.loading import hub_id_of, load


def run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options, SOURCE_FIELD)
    out = Path(options.out)
    n_tokens = _more_tokens(options.vocab_size)
    if not recipe.corpus.sources and not recipe.corpus.languages:
        raise UserError("there is no text to learn tokens from: name a SOURCE, or --source CODE=SOURCE")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {options.out!r} already holds files: name a new folder, or remove it")
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.extension.card import extension_card
        from hf_genlm.extension.rows import extend_model
        from hf_genlm.extension.tokens import extend_bpe
        from hf_genlm.text.corpus import read_documents
        from hf_genlm.text.encoding import encode_documents
        from hf_genlm.text.languages import check_languages

        check_languages(recipe.corpus)
        documents, _ = read_documents(recipe.corpus.languages or recipe.corpus.sources, recipe.corpus)
        kept: list[str] = []
        if options.keep:
            kept = [document.text for document in read_documents(options.keep, recipe.corpus)[0]]
        model, tokenizer = load(options.model)
        before = encode_documents(tokenizer, documents).n_tokens
        extension = extend_bpe(
            tokenizer.backend_tokenizer,
            (text for _, text in documents.texts()),
            n_tokens,
            kept,
            lambda done, total: display.hear(
                "progress", {"task": "new tokens", "done": done, "total": total}
            ),
        )
        extend_model(model, extension.pieces)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / "tokenizer.json").write_text(json.dumps(extension.state, ensure_ascii=False), encoding="utf-8")
        extended = load(str(out))[1]
        card = extension_card(
            out.name, Path(options.model).name, hub_id_of(options.model), len(extended), n_tokens
        )
        (out / "README.md").write_text(card, encoding="utf-8")
        after = encode_documents(extended, documents).n_tokens
    n_bytes = int(documents.n_bytes.sum())
    print(
        f"{len(extended):,} tokens in the vocabulary, {n_tokens:,} of them new; on {n_bytes:,} bytes "
        f"{n_bytes / before:.3f} bytes per token before, {n_bytes / after:.3f} now"
    )
    print(f"model: {out}\n\nhf-genlm train --from {out} SOURCE ...  # trains it on")


def _more_tokens(word: str) -> int:
    if not word.startswith("+") or not word[1:].isdecimal() or int(word) < 1:
        raise UserError(f"--vocab-size {word!r}: say how many tokens to add, as +1000")
    return int(word)
