"""The models of the pipeline: policy, frozen reference, reward model, critic.

Every forward but the decoding of a rollout goes through `hidden_states`, which knows how a batch is
padded. The shift by one between a state and the token that it predicts happens in
`response_states`, and only there.
"""

import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.batches import Batch
from rlhf.errors import InputError
from rlhf.files import HUB_TIMEOUT, hub_failure
from rlhf.tokens import encode_texts, prepare_tokenizer

REWARD_MODEL, LANGUAGE_MODEL = "a reward model", "a language model"


def from_pretrained(auto_class: Any, path: str, flag: str, **options: Any) -> Any:
    """Load from a folder or the Hub: safetensors only, no code of the checkpoint's own.

    Raises: InputError, in one line that names the argument.
    """
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is not None
    if not Path(path).is_dir() and not is_hub_id:
        raise InputError(f"{flag}={path}: no such checkpoint folder; name one, such as .../best")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        if (Path(path) / "adapter_config.json").is_file():
            above = Path(path).absolute().parent
            raise InputError(
                f"{flag}={path}: is an adapter alone; give the checkpoint that holds it merged,"
                f" such as {above}"
            )
        raise InputError(f"{flag}={path}: is not a checkpoint (it holds no config.json)")
    options["local_files_only"] = not is_within_reach(path)
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # the libraries raise a dozen kinds; all mean: cannot be loaded
        cause = str(error).strip().split("\n")[0]
        raise InputError(
            f"{flag}={path}: cannot be loaded ({type(error).__name__}: {cause}); give a checkpoint"
            " folder, or a Hub id that can be reached"
        ) from error


@cache
def is_within_reach(path: str) -> bool:
    """Whether a checkpoint is a folder, or the Hub answers for it; else the Hub's cache serves."""
    if Path(path).is_dir():
        return True
    return hub_failure(lambda: HfApi().model_info(path, timeout=HUB_TIMEOUT)) is None


def read_config(path: str, *, flag: str, kind: str, max_len: int) -> PretrainedConfig:
    """Read a checkpoint's config and check that it is of the right kind and long enough.

    Raises: InputError, before any weight is read.
    """
    if path == "REQUIRED":
        raise InputError(f"{flag}=REQUIRED: put a checkpoint's path in its place")
    config = from_pretrained(AutoConfig, path, flag)
    architecture = (config.architectures or ["?"])[0]
    seen = REWARD_MODEL if architecture.endswith("ForSequenceClassification") else LANGUAGE_MODEL
    if seen != kind:
        raise InputError(f"{flag}={path}: is {seen} ({architecture}); it must be {kind}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_len > positions:
        raise InputError(f"--max_len={max_len}: {path} has only {positions} positions; lower it")
    return config


def load_tokenizer(path: str, *, flag: str, kind: str, max_len: int) -> PreTrainedTokenizerFast:
    """Load and prepare a checkpoint's tokenizer, after checking its config: see `read_config`.

    Raises: InputError if there is none or it has ids that the model doesn't know.
    """
    config = read_config(path, flag=flag, kind=kind, max_len=max_len)
    tokenizer = prepare_tokenizer(from_pretrained(AutoTokenizer, path, flag))
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{flag}={path}: the tokenizer has {len(tokenizer)} tokens, the model only"
            f" {config.vocab_size}; they do not belong together"
        )
    return tokenizer


def require_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, flag: str
) -> None:
    """Stop unless both tokenizers give the same ids.

    Raises: InputError.
    """
    probe = ["<instruction>Is 2+2=4?</instruction><response>Yes, naturally.</response>"]
    same_vocabulary = tokenizer.get_vocab() == other.get_vocab()
    if not same_vocabulary or encode_texts(tokenizer, probe) != encode_texts(other, probe):
        raise InputError(f"{flag}: its tokenizer differs from the SFT model's; train it from there")


def set_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    """Set every dropout probability in a config; 0 makes training and sampling the same model."""
    for name, value in config.to_dict().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and ("dropout" in name or "pdrop" in name):
            setattr(config, name, dropout)
    return config


def load_weights(
    auto_class: Any, path: str, flag: str, config: PretrainedConfig, device: torch.device
) -> PreTrainedModel:
    """Load a model in float32 onto a device, in evaluation mode."""
    options = {"config": config, "dtype": torch.float32, "use_safetensors": True}
    model = from_pretrained(auto_class, path, flag, **options)
    fuse_activations(model)
    return model.to(device).eval()


def fuse_activations(module: nn.Module) -> None:
    """Let one kernel compute the tanh form of GELU, where a model writes it as eight operations."""
    for name, child in module.named_children():
        if isinstance(child, NewGELUActivation | FastGELUActivation):
            setattr(module, name, GELUTanh())
        fuse_activations(child)


def load_policy(
    path: str, *, flag: str, device: torch.device, dropout: float = 0.0
) -> PreTrainedModel:
    """Load a causal language model. Raises: InputError."""
    config = set_dropout(from_pretrained(AutoConfig, path, flag), dropout)
    model = load_weights(AutoModelForCausalLM, path, flag, config, device)
    if not has_plain_head(model):
        raise InputError(
            f"{flag}={path}: {type(model).__name__} does more to its logits than its output layer"
            " (a scale or a cap), which no stage knows; give another model"
        )
    return model


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are its output layer's, applied to its last states."""
    ids = torch.arange(4, device=model.device)[None]
    states = model.base_model(ids, use_cache=False).last_hidden_state
    ours, theirs = model.get_output_embeddings()(states), model(ids, use_cache=False).logits
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def load_reward_model(
    path: str, *, flag: str, device: torch.device, eos_id: int, dropout: float = 0.0
) -> PreTrainedModel:
    """Load a reward model, or put a new head on a language model: one logit a sequence.

    The new head is drawn from torch's global generator: seed it first.
    """
    config = set_dropout(from_pretrained(AutoConfig, path, flag), dropout)
    config.num_labels = 1
    # transformers reads the logit at the last token that isn't padding: with pad = EOS that is the
    # token before EOS, which `reward_logits` reads too.
    config.pad_token_id = eos_id
    return load_weights(AutoModelForSequenceClassification, path, flag, config, device)


def prepare_training(
    model: PreTrainedModel, *, gradient_checkpointing: bool, compile: bool
) -> PreTrainedModel:
    """Set how the trunk of a model computes; what it computes stays the same.

    Gradient checkpointing works in training mode only.
    Raises: InputError if the architecture cannot do it.
    """
    if gradient_checkpointing:
        layers: list[Any] = [
            x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)
        ]
        if not layers:
            raise InputError(f"--gradient_checkpointing: {type(model).__name__} cannot do it")
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    if compile:
        model.base_model.compile(dynamic=True)
    return model


def set_generation_defaults(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    **sampling: Any,
) -> None:
    """Set how `generate` answers by default: its stop token, and how it samples if that is told."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:  # (B, T, D)
    """Run the trunk over a batch; what stands at padding means nothing.

    The trunk sees each row's tokens side by side from the first column on. So positions count
    themselves, causality alone keeps real tokens from padding, and without a mask attention takes
    its fastest kernel.
    """
    trunk = getattr(model, "base_model", model)
    ids, places = batch.without_gaps()  # (B, longest row), (B, T)
    states = trunk(input_ids=ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return states[rows, places]


def response_states(model: nn.Module, batch: Batch) -> Tensor:  # (B, R, D)
    """Give the states that predict the response tokens: from the last prompt token onwards."""
    first = batch.prompt_ids.shape[1] - 1
    return hidden_states(model, batch)[:, first:-1]


class Critic(nn.Module):
    """V(s): a linear head, which starts out as the constant `mean_reward`, on a trunk.

    Without a trunk of its own (`None`) it reads the policy's states. The head is unbounded, since
    returns hold the KL penalty and leave the reward's own range.
    """

    def __init__(self, trunk: nn.Module | None, hidden_size: int, mean_reward: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, mean_reward)

    def forward(self, policy_states: Tensor, batch: Batch) -> Tensor:  # (B, R, D) -> (B, R)
        """Values of the states before each response token, in float32."""
        states = policy_states if self.trunk is None else response_states(self.trunk, batch)
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float()).squeeze(-1)


def reward_logits(model: PreTrainedModel, batch: Batch, *, eos_id: int) -> Tensor:  # (B,)
    """Read a reward model's logit at the last token that isn't EOS."""
    last = batch.prompt_ids.shape[1] + batch.response_mask.sum(dim=1) - 1  # (B,)
    rows = torch.arange(len(last), device=last.device)
    last = last - (batch.input_ids[rows, last] == eos_id).long()
    states = hidden_states(model, batch)[rows, last]  # (B, D)
    with torch.autocast(states.device.type, enabled=False):
        return model.get_submodule("score")(states.float()).squeeze(-1)
