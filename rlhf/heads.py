"""What turns a model's last states into logits: a linear layer, or that and something more.

A linear layer serves in parts: logprobs.py makes its logits for some hundred tokens at a time.
Some models scale or cap what their layer gives (Gemma 2, Cohere, Granite): of these every stage
takes the logits that the model's own forward gives.
"""

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlhf.errors import InputError

MARK = "gives_logits"  # on models whose own forward has to give the logits


@torch.no_grad()
def mark_head(model: PreTrainedModel) -> PreTrainedModel:
    """Note on a language model whether its logits are its output layer's, applied to its states."""
    seen: list[Tensor] = []
    layer: Any = model.get_output_embeddings()
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    ids = torch.arange(4, device=model.device)[None]
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        hook.remove()
    is_plain = isinstance(layer, Linear) and len(seen) == 2
    if is_plain:
        states = model.base_model(ids, use_cache=False).last_hidden_state
        # A cap hardly moves small logits, so these are compared exactly: nothing may touch them.
        is_plain = torch.equal(seen[1], logits)
        is_plain = is_plain and torch.allclose(seen[0], states, rtol=1e-3, atol=1e-4)
    if isinstance(layer, Linear) and not is_plain:
        layer.forward = partial(exact_linear, layer)  # type: ignore[method-assign]
    setattr(model, MARK, not is_plain)
    return model


def exact_linear(layer: Linear, states: Tensor) -> Tensor:
    """Apply an output layer in float32, whatever precision the trunk ran in."""
    with torch.autocast(states.device.type, enabled=False):
        return linear(states.float(), layer.weight, layer.bias)


def gives_logits(model: Any) -> bool:
    """Whether the logits have to come from the model's own forward."""
    return bool(getattr(model, MARK, False))


def head_of(model: PreTrainedModel) -> Linear | None:
    """Return the output layer that logprobs are made with; None if the states are logits."""
    head: Any = model.get_output_embeddings()
    return None if gives_logits(model) else head


def head_width(model: PreTrainedModel) -> int:
    """Count the numbers of a last state; they may be fewer than in the layers (OPT-350m)."""
    layer: Any = getattr(model, "score", None) or model.get_output_embeddings()
    return layer.weight.shape[1]


def own_logits(model: Any, num_last: int, **inputs: Any) -> Tensor:  # (B, num_last, V)
    """Give the logits of the model's own forward at the last positions, in float32."""
    if "logits_to_keep" in signature(model.forward).parameters:
        inputs["logits_to_keep"] = num_last
    return model(**inputs).logits[:, -num_last:].float()


def require_states(model: PreTrainedModel, *, flag: str) -> None:
    """Stop if something would read states where a model gives logits."""
    if gives_logits(model):
        raise InputError(
            f"{flag}: reads the policy's states, which {type(model).__name__} keeps to itself (it"
            " does more to its logits than its output layer); use --critic=separate"
        )
