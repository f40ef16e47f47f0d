"""The card of a model with new tokens that has not been trained on yet: what it is made of."""

from hf_genlm.report import markdown


def extension_card(name: str, base: str, base_id: str | None, n_tokens: int, n_new: int) -> str:
    """
    Args:
        name: of the model.
        base: what the model was called that got the tokens.
        base_id: the Hub id of that model, or of the one that it was made of; None: neither is on the Hub.
        n_tokens: in the vocabulary now.
        n_new: so many of them are new.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["genlm", "custom_code"],
        base_model=base_id,
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {markdown.prose(name)}\n\n"
        f"{markdown.code(base_id or base)} with {n_new:,} new tokens, {n_tokens:,} in all, by "
        "`hf-genlm extend`. A new token begins as the mean of its pieces; nothing was trained yet.\n"
    )
