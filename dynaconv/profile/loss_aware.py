"""How sensitive the loss is to an error of each FFN's output: a backward pass through the whole model.

To first order an error e in an FFN's output y costs e . dLoss/dy, at most ||e|| ||dLoss/dy|| = r ||y|| ||dLoss/dy||.
So a token's difficulty curve r_n is weighted with g = ||dLoss/dy|| ||y||, normalised to mean 1 over tokens and layers.
Here y is the output of the down projection, before a norm where the family has one there.

B batch, T tokens, D residual width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.stock import stock_names
from dynaconv.data.windows import Batch
from dynaconv.profile.capture import capture
from dynaconv.profile.measure import Sample
from dynaconv.profile.skeleton import skeleton
from dynaconv.profile.streaming import LayerStream
from dynaconv.ranks import Ranks

TOKENS = 1024  # tokens in one backward pass: its activations are kept for all layers


def loss_weights(
    stream: LayerStream,
    sample: Sample,
    *,
    trust_remote_code: bool = False,
    finished: Callable[[Batch, int], None] = lambda batch, tokens: None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Sensitivity g of the loss at every layer and curve token of ``sample``, from one backward pass.

    Args:
        stream: Says which checkpoint, and what to compute in and where.
        sample: Which tokens.
        trust_remote_code: Let transformers run code from the checkpoint's folder.
        finished: Called after each micro-batch, with the number of its curve tokens.
        ranks: The processes that each have some of the tokens; alone by default.

    Returns:
        ``(L, curve tokens)`` float32 on the CPU, mean 1 over all ranks.

    Raises:
        CheckpointError: A weight is NaN or infinite; the message names the tensor.
    """
    model = whole_model(stream.checkpoint, stream.dtype, stream.device, trust_remote_code=trust_remote_code)
    parts = [torch.zeros(stream.checkpoint.layers, 0)]
    for batch, mask in zip(sample.batches, sample.curve_masks, strict=True):
        size = max(1, TOKENS // batch.input_ids.shape[1])
        measured = int(mask.any(dim=1).nonzero().max()) + 1 if bool(mask.any()) else 0  # windows, from the first
        for start in range(0, measured, size):
            piece = batch.rows(start, start + size).to(stream.device)
            chosen = mask[start : start + size].to(stream.device)
            parts.append(sensitivity(model, stream.checkpoint, piece)[:, chosen].cpu())
            finished(piece, int(chosen.sum()))
    weights = torch.cat(parts, dim=1)
    total = torch.stack([weights.double().sum(), torch.tensor(float(weights.numel()), dtype=torch.float64)])
    total = total if ranks is None else ranks.sum(total)
    return weights / (total[0] / total[1]).float().clamp_min(torch.finfo(torch.float32).tiny)


def sensitivity(model: Any, checkpoint: Checkpoint, batch: Batch) -> Tensor:
    """||dLoss/dy|| ||y|| of every token and layer, Loss being the sum over the batch of nats: (L, B, T) float32."""
    spec = checkpoint.family.ffn
    names = [f"{spec.path.format(layer=i)}.{spec.down}" for i in range(checkpoint.layers)]
    downs = {name: model.get_submodule(name) for name in names}
    with torch.enable_grad(), capture(outputs=downs) as captured:
        embedded = model.get_input_embeddings()(batch.input_ids).requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=batch.attention_mask, use_cache=False).logits
        scored = batch.predicted
        loss = cross_entropy(logits[:, :-1][scored].float(), batch.input_ids[:, 1:][scored], reduction="sum")
        outputs = [captured.outputs[name] for name in names]
        gradients = torch.autograd.grad(loss, outputs)
    sizes = []
    for down, output, gradient in zip(downs.values(), outputs, gradients, strict=True):
        own = output.detach() if down.bias is None else output.detach() - down.bias
        size = own.float().norm(dim=-1) * gradient.float().norm(dim=-1)
        sizes.append(size.view(batch.input_ids.shape))  # OPT flattens its tokens
    return torch.stack(sizes)


def whole_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> Any:
    """The stock model with all its weights, frozen, for evaluation.

    Raises:
        CheckpointError: A weight is NaN or infinite; the message names the tensor.
    """
    model = skeleton(checkpoint, dtype, device, trust_remote_code=trust_remote_code)
    names = stock_names(checkpoint, model)
    state = {names[name]: checkpoint.reader.read_finite(name).to(device, dtype) for name in names}
    model.load_state_dict(state, strict=not checkpoint.tied, assign=True)
    model.tie_weights()
    return model
