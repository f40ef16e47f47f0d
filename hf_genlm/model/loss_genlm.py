"""The loss without the logits: head and cross-entropy a few rows at a time."""

import torch
import torch.nn.functional as F

# Rows of logits that exist at once, measured by recipes/benchmarks/loss_memory.py: torch's automatic choice
# takes less memory and twice the time on a CPU.
_ROWS = 1024


def chunked_causal_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """transformers' ForCausalLMLoss of hidden_states @ weight.T + bias, which are never all in memory.

    Args:
        hidden_states: (B, T, r).
        weight, bias: (V, r) and (V,), or None.
        labels: (B, T), not shifted; `shift_labels`: (B, T), already shifted, in their place.
        num_items_in_batch: the sum is divided by it; None: the mean over labels.

    Returns:
        the loss in nats; the gradients are those of the plain path, to rounding.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    total = F.linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        targets,
        linear_bias=bias,
        reduction="sum",
        ignore_index=ignore_index,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_ROWS, acc_policy="accurate"),
    )
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
