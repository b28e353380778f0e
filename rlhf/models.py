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
from rlhf.heads import gives_logits, mark_head, own_logits
from rlhf.templates import prepare_tokenizer
from rlhf.tokens import stop_ids

REWARD_MODEL, LANGUAGE_MODEL = "a reward model", "a language model"
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


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
    if config.get_text_config() is not config:
        raise InputError(
            f"{flag}={path}: {architecture} reads more than text; give a model of text alone"
        )
    if 0 < (positions := positions_of(config)) < max_len:
        raise InputError(f"--max_len={max_len}: {path} has only {positions} positions; lower it")
    return config


def positions_of(config: PretrainedConfig) -> int:
    """Count the tokens that a model can read; 0 if its config tells no end."""
    return next((n for x in POSITIONS if isinstance(n := getattr(config, x, None), int)), 0)


def load_tokenizer(
    path: str, *, flag: str, kind: str, max_len: int, chat_template: str = "auto"
) -> PreTrainedTokenizerFast:
    """Load and prepare a checkpoint's tokenizer, after checking its config: see `read_config`.

    Raises: InputError if there is none or it has ids that the model doesn't know.
    """
    config = read_config(path, flag=flag, kind=kind, max_len=max_len)
    tokenizer = prepare_tokenizer(from_pretrained(AutoTokenizer, path, flag), chat_template)
    require_known_ids(tokenizer, config, path=path, flag=flag)
    return tokenizer


def require_known_ids(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, *, path: str, flag: str
) -> None:
    """Stop if a tokenizer has ids that the model doesn't know. Raises: InputError."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{flag}={path}: the tokenizer has {len(tokenizer)} tokens, the model only"
            f" {config.vocab_size}; they do not belong together"
        )


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
    if getattr(config, "attn_logit_softcapping", None):  # which only the plain attention knows
        options["attn_implementation"] = "eager"
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
    return mark_head(load_weights(AutoModelForCausalLM, path, flag, config, device))


def load_reward_model(
    path: str, *, flag: str, device: torch.device, pad_id: int, dropout: float = 0.0
) -> PreTrainedModel:
    """Load a reward model, or put a new head on a language model: one logit a sequence.

    The new head is drawn from torch's global generator: seed it first.
    """
    config = set_dropout(from_pretrained(AutoConfig, path, flag), dropout)
    config.num_labels = 1
    # transformers reads the logit at the last token that isn't padding: with pad = EOS that is the
    # token before EOS, with a pad token of its own the stop token. `reward_logits` reads it there.
    config.pad_token_id = pad_id
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


def model_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids at which a response of this model ends."""
    own: Any = model.generation_config
    return stop_ids(tokenizer, own and own.eos_token_id)


def set_generation_defaults(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    **sampling: Any,
) -> None:
    """Set how `generate` answers by default: where it stops, and how it samples if that is told."""
    stops = model_stop_ids(model, tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else stops[0],
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
    """Give the states that predict the response tokens: from the last prompt token onwards.

    Of a model that gives its own logits it is these, (B, R, V): see `rlhf.heads`.
    """
    first = batch.prompt_ids.shape[1] - 1
    if not gives_logits(model):
        return hidden_states(model, batch)[:, first:-1]
    ids, places = batch.without_gaps()  # (B, longest row), (B, T)
    places = places[:, first:-1]  # (B, R)
    start = int(places.min())
    logits = own_logits(model, ids.shape[1] - start, input_ids=ids, use_cache=False)
    return logits[torch.arange(len(ids), device=ids.device)[:, None], places - start]


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


def reward_logits(model: PreTrainedModel, batch: Batch, *, pad_id: int) -> Tensor:  # (B,)
    """Read a reward model's logit at the last token that isn't the padding token."""
    columns = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    last = (columns * (batch.mask & (batch.input_ids != pad_id))).argmax(dim=1)  # (B,)
    rows = torch.arange(len(last), device=last.device)
    states = hidden_states(model, batch)[rows, last]  # (B, D)
    with torch.autocast(states.device.type, enabled=False):
        return model.get_submodule("score")(states.float()).squeeze(-1)
