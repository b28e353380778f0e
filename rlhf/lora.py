"""LORA: a few weights beside frozen ones are trained: the adapter.

    y = x W + (alpha / r) * (x A) B        W frozen; A (in, r), B (r, out) trained, B = 0 at first

Adapters are put into the trunk of a model in place, so it stays the class that it is. A checkpoint
holds W + (alpha / r) A B under the name of W, and the adapter alone in a folder beside it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import InputError

ADAPTER = "default"  # the adapter that a checkpoint holds, by peft's own name for an only one
ADAPTER_FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft reads them
ALL_LINEAR = "all-linear"
HEAD = "score"  # of a reward model: a single row, trained in full
PREFIX = "base_model.model."  # peft's, before the name of a weight


def add_adapter(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str],
    name: str = ADAPTER,
) -> PreTrainedModel:
    """Freeze a model and put an adapter of rank r, drawn from torch's global generator, into it.

    `targets` name linear layers of the trunk, by their full names or the ends of them. The head of
    a reward model stays trainable. Raises: InputError if a target is no such layer.
    """
    layers = target_layers(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(layers),
        # Conv1D, GPT-2's linear layer, holds its weight as (in, out).
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    inject(model, config, name)
    if isinstance(head := getattr(model, HEAD, None), nn.Linear):
        head.requires_grad_(True)
    return model


def target_layers(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Find the linear layers that are named, by their names in the trunk. Raises: InputError."""
    trunk, prefix = model.base_model, f"{model.base_model_prefix}."
    inside = tuple(f"{place}." for place in lora_layers(trunk))  # of other adapters
    modules = {
        name: getattr(module, "base_layer", module)
        for name, module in trunk.named_modules()
        if name and not name.startswith(inside)
    }
    layers: dict[str, nn.Module] = {
        name: x for name, x in modules.items() if isinstance(x, nn.Linear | Conv1D)
    }
    if ALL_LINEAR in targets:
        return layers
    ends = sorted({name.rpartition(".")[2] for name in layers})
    there = f"name layers of {', '.join(ends[:8])}{' …' if len(ends) > 8 else ''}, or {ALL_LINEAR}"
    heads = {name for name, _ in model.named_modules() if not f"{name}.".startswith(prefix)}
    found: dict[str, nn.Module] = {}
    for target in targets:
        end = f".{target.removeprefix(prefix)}"
        named = {name: x for name, x in modules.items() if f".{name}".endswith(end)}
        here = {name: x for name, x in named.items() if name in layers}
        if any(isinstance(x, nn.Embedding) for x in named.values()):
            why = "is an embedding, which takes no adapter"
        elif target and target in heads:
            why = "is the output layer, whose weight is read as it stands"
        else:
            why = "matches no linear layer"
        if not here:
            raise InputError(f"--lora_target_modules={target}: {why}; {there}")
        found |= here
    return found


def inject(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Put an adapter into a model's trunk; `ADAPTER` is the one that computes, if it is there."""
    trunk: Any = model.base_model
    others = trunk.__dict__.pop("peft_config", {})  # peft warns of several, which are meant here
    if not others:
        model.requires_grad_(False)
    inject_adapter_in_model(config, trunk, name)
    trunk.peft_config = {**others, name: config}
    for layer in lora_layers(trunk).values():
        layer._active_adapter = [ADAPTER]
    for weight in adapter_weights(model, name).values():
        weight.requires_grad_(True)
    trunk.train(trunk.training)  # the new dropouts too


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """Find the layers with adapters, by name."""
    return {name: x for name, x in module.named_modules() if isinstance(x, LoraLayer)}


def adapter_weights(model: PreTrainedModel, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Give the weights of an adapter under the names that peft has for them in a file."""
    return {
        f"{PREFIX}{place}.{part}.weight": getattr(layer, part)[name].weight
        for place, layer in lora_layers(model).items()
        if name in layer.lora_A
        for part in ("lora_A", "lora_B")
    }


@contextmanager
def active(module: nn.Module, name: str | None) -> Iterator[None]:
    """Let a module compute with the adapter of this name alone; None: without any.

    peft's own switches set `requires_grad` as well, and would leave an adapter frozen.
    """
    layers = [*lora_layers(module).values()]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter = layer._active_adapter if name is None else [name]
        layer._disable_adapters = name is None
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = state


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Give all weights with the adapter added, under the names they had before; None without one.

    The weights that are trained are not touched: merging and unmerging would round them.
    """
    layers, weights = lora_layers(model), model.state_dict()
    if not layers:
        return None
    for place, layer in layers.items():
        own = {key: weights.pop(key) for key in [*weights] if key.startswith(f"{place}.")}
        for key, tensor in own.items():
            if key.startswith(base := f"{place}.base_layer."):
                weights[f"{place}.{key.removeprefix(base)}"] = tensor
        if ADAPTER in layer.lora_A:
            weights[f"{place}.weight"] = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
    return weights


def save_adapter(model: PreTrainedModel, folder: Path, *, parent: str) -> None:
    """Write a model's adapter as peft does, if it has one; it belongs onto the parent checkpoint.

    A reward model's head is part of it.
    """
    tensors = {key: weight.detach() for key, weight in adapter_weights(model).items()}
    if not tensors:
        return
    trunk: Any = model.base_model
    facts = trunk.peft_config[ADAPTER].to_dict()
    facts |= {"base_model_name_or_path": parent, "inference_mode": True, "task_type": "CAUSAL_LM"}
    if (head := getattr(model, HEAD, None)) is not None:
        tensors |= {f"{PREFIX}{HEAD}.{key}": tensor for key, tensor in head.state_dict().items()}
        facts |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    # peft keeps sets, whose order changes from one process to the next.
    facts = {key: sorted(x) if isinstance(x, set) else x for key, x in facts.items()}
    folder.mkdir()
    save_file(
        {key: x.contiguous() for key, x in tensors.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    text = json.dumps(facts, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path, *, name: str) -> dict[str, Tensor]:
    """Put a saved adapter into a model under another name; returns what else was saved with it.

    Its dropout stays behind. Raises: InputError if the layers that it belongs to are not there.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.lora_dropout, config.inference_mode = 0.0, False
    config.task_type = config.modules_to_save = None
    inject(model, config, name)
    tensors = load_file(folder / WEIGHTS, device=str(model.device))
    for key, weight in adapter_weights(model, name).items():
        if key not in tensors or tensors[key].shape != weight.shape:
            raise InputError(f"{folder}: belongs to another model: it holds no fitting {key}")
        weight.copy_(tensors.pop(key))
    return tensors


def trained_share(*modules: nn.Module) -> str:
    """Say how much of some modules is trained, and what that spares."""
    weights = {id(p): p for p in chain.from_iterable(m.parameters() for m in modules)}.values()
    added = {
        id(p)
        for module in modules
        for layer in lora_layers(module).values()
        for name, p in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    trained = sum(p.numel() for p in weights if p.requires_grad)
    whole = sum(p.numel() for p in weights if id(p) not in added)
    return (
        f"LoRA: {short(trained)} of {short(whole)} weights are trained ({trained / whole:.2%});"
        f" AdamW keeps {short(8 * trained, ' ')}B for them instead of {short(8 * whole, ' ')}B"
    )


def short(number: float, gap: str = "") -> str:
    """Write a number of any size in a few characters.

    >>> [short(n) for n in (950, 811_008, 124_439_808, 1_557_611_200)]
    ['950', '811k', '124M', '1.56G']
    """
    unit = 0
    while number >= 1000 and unit < 3:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g}{gap}{('', 'k', 'M', 'G')[unit]}"
