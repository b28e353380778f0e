"""Keys and values of a decode loop, in one allocation that is written in place.

transformers' own cache makes a larger copy of itself for every token. Here the rows of a batch are
slots, and its columns are moments: whatever a slot holds ends at the same column, so that to the
model it is a batch padded on the left, whichever prompt came into which slot when.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether all that a model remembers of a text is keys and values of its attention."""
    takes = inspect.signature(model.base_model.forward).parameters
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return "past_key_values" in takes and layers <= {DynamicLayer, DynamicSlidingWindowLayer}


def takes_any_mask(model: PreTrainedModel) -> bool:
    """Whether all layers take one mask (B, 1, 1, T): then transformers need not build its own."""
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    takes = inspect.signature(model.base_model.forward).parameters
    attention = model.config._attn_implementation
    has_alibi = getattr(model.config, "alibi", False)  # whose biases are made of a mask (B, T)
    is_uniform = layers == {DynamicLayer} and "position_ids" in takes
    return is_uniform and attention == "sdpa" and not has_alibi


class SlotLayer(DynamicLayer):
    """One layer's keys and values: (slots, heads, columns, size of a head) each."""

    keys: Tensor  # from the first tokens on
    values: Tensor

    def __init__(self, num_slots: int, num_columns: int) -> None:
        super().__init__()
        self.num_slots, self.num_columns, self.filled = num_slots, num_columns, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, once the first tokens tell the shape. Masked cells have to be finite."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_zeros(self.num_slots, x.shape[1], self.num_columns, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens of all slots; returns views of everything so far."""
        start, end = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start:end], self.values[:, :, start:end] = key_states, value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Columns that are filled."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and the first of them."""
        return self.filled + query_length, 0

    def store(self, slots: Tensor, keys: Tensor, values: Tensor, end: int) -> None:
        """Put prompts into slots, so that they end before a column."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start, self.filled = end - keys.shape[2], end
        self.keys[slots, :, start:end], self.values[slots, :, start:end] = keys, values

    def shift(self, columns: int) -> None:
        """Forget the first columns and move the others to the left."""
        end = self.filled - columns
        for x in (self.keys, self.values):
            x[:, :, :end] = x[:, :, columns : self.filled].clone()
        self.filled = end

    def select(self, slots: Tensor) -> None:
        """Keep some slots only."""
        self.keys, self.values = self.keys[slots], self.values[slots]


class SlotCache(Cache):
    """The layers of a model; there are none before the first prompts."""

    def __init__(self, num_slots: int, num_columns: int) -> None:
        super().__init__(layers=[])
        self.shape = (num_slots, num_columns)
        self.slot_layers: list[SlotLayer] = []

    def store(self, slots: Tensor, prompts: Cache, end: int) -> None:
        """Put prompts, as a forward has read them, into slots."""
        if not self.slot_layers:
            self.slot_layers = [SlotLayer(*self.shape) for _ in prompts.layers]
            self.layers = list(self.slot_layers)
        for layer, source in zip(self.slot_layers, prompts.layers, strict=True):
            layer.store(slots, source.keys, source.values, end)  # type: ignore[union-attr,arg-type]

    def shift(self, columns: int) -> None:
        """Forget the first columns of all layers."""
        for layer in self.slot_layers:
            layer.shift(columns)

    def select(self, slots: Tensor) -> None:
        """Keep some slots only, in all layers."""
        for layer in self.slot_layers:
            layer.select(slots)
