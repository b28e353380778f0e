"""TRUNK: policy, reference, critic and reward model on one frozen trunk, by adapters.

The trunk is the SFT model's. The policy is the trunk with the first adapter, the reference is it
without any, critic and reward model have adapters of their own: one model in memory, not four.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel

from rlhf.checkpoints import content_of, read_run
from rlhf.errors import InputError
from rlhf.lora import (
    ADAPTER_FOLDER,
    CONFIG,
    HEAD,
    PREFIX,
    active,
    adapter_weights,
    load_adapter,
    lora_layers,
)
from rlhf.models import from_pretrained

CRITIC, REWARD = "critic", "reward"  # adapters beside the policy's


class AdapterView(nn.Module):
    """A model's trunk as it computes with one of its adapters, which is all that it owns."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        self.of = (model.base_model,)  # in a tuple: its weights are not this module's
        self.name = name
        self.adapter = nn.ParameterList(adapter_weights(model, name).values())

    def forward(self, **inputs: Any) -> Any:
        """Run the trunk."""
        (trunk,) = self.of
        with active(trunk, self.name):
            return trunk(**inputs)


class SharedRewardModel(nn.Module):
    """A reward model as `reward_logits` reads it, of a saved adapter with its head; frozen."""

    def __init__(self, model: PreTrainedModel, path: str, *, flag: str) -> None:
        super().__init__()
        self.config = from_pretrained(AutoConfig, path, flag)
        others = load_adapter(model, Path(path) / ADAPTER_FOLDER, name=REWARD)
        self.base_model = AdapterView(model, REWARD)
        weight = others[f"{PREFIX}{HEAD}.weight"]  # (1, D)
        self.score = nn.Linear(weight.shape[1], 1, bias=False, device=model.device)
        self.score.load_state_dict({"weight": weight})
        self.requires_grad_(False).eval()


def require_shareable(path: str, *, flag: str, sft_path: str) -> None:
    """Stop unless a reward model is an adapter that was trained on this SFT model.

    Raises: InputError.
    """
    run = read_run(path, flag=flag)
    if not (Path(path) / ADAPTER_FOLDER / CONFIG).is_file():
        raise InputError(
            f"--share_trunk: {flag}={path} has no adapter: train it by run_rm.py --use_peft, or"
            " leave --share_trunk out"
        )
    if run.get("parent_content") != content_of(sft_path):
        raise InputError(
            f"--share_trunk: {flag}={path} is an adapter of {run.get('parent')}, which is not"
            f" --sft_model_path={sft_path} or has changed; name that one, or leave --share_trunk"
            " out"
        )


def recompute_as_run(model: PreTrainedModel) -> None:
    """Let gradient checkpointing compute a layer again with the adapter it was run with.

    The backward pass comes when another adapter may be the active one.
    """
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            context = partial(forward_and_recompute, layer)
            again = partial(checkpoint, use_reentrant=False, context_fn=context)
            layer._gradient_checkpointing_func = again  # type: ignore[assignment]


def forward_and_recompute(layer: nn.Module) -> tuple[Any, Any]:
    """Give the contexts of a layer's forward, which begins now, and of its repetition."""
    first = next(iter(lora_layers(layer).values()), None)
    name = None if first is None or first.disable_adapters else first.active_adapter[0]
    return nullcontext(), active(layer, name)
