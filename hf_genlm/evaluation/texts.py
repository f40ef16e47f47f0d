"""The likelihood of plain texts by a model that is named: nothing to prepare, in one call."""

from collections.abc import Sequence

import numpy as np

from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.evaluation.samples import start_id_of
from hf_genlm.loading import load

_DEFAULT_CONTEXT = 1024  # tokens, of a model that has no limit


def score_texts(
    texts: Sequence[str], model_id: str, *, context: int | None = None, batch_size: int = 32
) -> list[Measurement]:
    """What `measure_likelihood` says of `texts`, each a document; `model_id` is what `load` takes.

    Args:
        context: tokens that the model sees at once; None: all that it has positions for.

    Raises:
        UserError: the model cannot be loaded, has no start token, or there is no text.
    """
    model, tokenizer = load(model_id)
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    documents = [
        (np.array(tokens, dtype=np.int64), len(text.encode("utf-8")))
        for tokens, text in zip(ids, texts, strict=True)
    ]
    return measure_likelihood(
        model,
        documents,
        start_id=start_id_of(tokenizer),
        context=context or getattr(model.config, "max_position_embeddings", None) or _DEFAULT_CONTEXT,
        batch_size=batch_size,
        split="given",
    )
