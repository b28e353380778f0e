"""ACTORS: policy, reference and critic, which see every token of a response."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.heads import head_width, require_states
from rlhf.lora import ADAPTER_FOLDER, active, add_adapter, load_adapter
from rlhf.models import (
    Critic,
    load_policy,
    load_reward_model,
    model_stop_ids,
    prepare_training,
)
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling
from rlhf.tokens import early_end_ids
from rlhf.trunk import CRITIC, AdapterView, recompute_as_run


class Actors(NamedTuple):
    """The models, and how they are run."""

    policy: PreTrainedModel
    ref_policy: PreTrainedModel | None  # None: the policy without its adapter
    critic: Critic | None  # None where nobody is asked for values
    sampling: Sampling
    runtime: Runtime

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Give the reference, for the forwards within."""
        if self.ref_policy is not None:
            yield self.ref_policy
            return
        with active(self.policy, None):
            yield self.policy


def build_sampling(
    flags: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel
) -> Sampling:
    """Take what tells how responses are drawn out of a script's flags."""
    settings = {name: value for name, value in flags.items() if name in Sampling._fields}
    stops = model_stop_ids(policy, tokenizer)
    early = early_end_ids(tokenizer, stops)
    return Sampling(**settings, pad_id=tokenizer.pad_token_id, stop_ids=stops, early_end_ids=early)


def load_models(
    sft_path: str,
    rm_path: str | None,  # where the critic starts; None: as the SFT model
    *,
    critic: str,  # "separate", "shared" (a head on the policy's states) or "none"
    mean_reward: float,
    lora: Mapping[str, Any] | None,  # what `add_adapter` takes; None: all weights are trained
    share_trunk: bool,
    gradient_checkpointing: bool,
    compile: bool,
    device: torch.device,
    pad_id: int,
) -> tuple[PreTrainedModel, PreTrainedModel | None, Critic | None]:  # policy, reference, critic
    """Load policy and reference, and perhaps a critic: on the reward model's trunk if there is one.

    Every dropout is at 0: PPO compares numbers of forwards that must be the same function. With an
    adapter on the policy, the reference is the policy without it.
    """
    load = partial(load_policy, sft_path, flag="--sft_model_path", device=device)
    prepare = partial(
        prepare_training, gradient_checkpointing=gradient_checkpointing, compile=compile
    )

    def adapt(model: PreTrainedModel) -> PreTrainedModel:
        return add_adapter(model, **lora) if lora else model

    policy = adapt(load())
    ref_policy = None if lora else load().requires_grad_(False)
    trunk: Any = None
    width = head_width(policy)
    if critic == "shared":
        require_states(policy, flag="--critic=shared")
    elif critic == "separate" and share_trunk and lora:
        trunk = critic_view(policy, rm_path, lora=lora)
    elif critic == "separate":
        on_reward = partial(load_reward_model, flag="--rm_model_path", device=device, pad_id=pad_id)
        model = prepare(adapt(on_reward(rm_path) if rm_path else load()))
        trunk, width = model.base_model, head_width(model)
    prepare(policy)
    if share_trunk:
        recompute_as_run(policy)
    if critic == "none":
        return policy, ref_policy, None
    return policy, ref_policy, Critic(trunk, width, mean_reward).to(device).train()


def critic_view(
    policy: PreTrainedModel, rm_path: str | None, *, lora: Mapping[str, Any]
) -> AdapterView:
    """Put the critic's adapter on the policy's trunk: at first a copy of the reward model's."""
    if rm_path:
        load_adapter(policy, Path(rm_path) / ADAPTER_FOLDER, name=CRITIC)
    else:
        add_adapter(policy, **lora, name=CRITIC)
    return AdapterView(policy, CRITIC)
