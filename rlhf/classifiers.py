"""CLASSIFIERS: any model of text classification as a judge, by the raw logit of one of its labels.

It reads the response in a form of its own, through its own tokenizer: by the tokenizer's chat
template if it has one, else as the pair of texts (prompt, response).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Embedding, Linear
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.batches import Batch, Room, micro_batches, pad_right
from rlhf.errors import InputError
from rlhf.heads import exact_linear
from rlhf.models import (
    REWARD_MODEL,
    from_pretrained,
    load_weights,
    positions_of,
    read_config,
    require_known_ids,
)
from rlhf.records import Prompt
from rlhf.rewards import Scorer
from rlhf.runtime import Runtime
from rlhf.templates import REMEDY, render
from rlhf.tokens import encode_by_template


class Classifier(NamedTuple):
    """A text classifier, and which of its logits is the reward."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    label: int
    label_name: str
    most_tokens: int  # that it can read; 0: no end is known

    @property
    def one_by_one(self) -> bool:
        """Whether it cannot tell padding from text; then a text has to come alone."""
        pad_id = getattr(self.config, "pad_token_id", None)
        return pad_id is None or pad_id < 0

    def told(self, *, max_len: int) -> str:
        """Say what the reward is, and what is to be known of it."""
        form = "its chat template" if self.tokenizer.chat_template else "the pair of texts"
        label = f"{self.label} ({self.label_name})"
        lines = [f"reward: the logit of label {label} of {self.path}, by {form}"]
        if 0 < self.most_tokens < max_len:
            lines.append(
                f"note: it reads {self.most_tokens} tokens, fewer than --max_len={max_len}; what is"
                " longer is cut, of a conversation the beginning"
            )
        if self.one_by_one:
            lines.append(
                "note: its config.json names no pad_token_id, so it reads one text at a time"
            )
        return "\n".join(lines)


class Text(NamedTuple):
    """A prompt and a response as one text."""

    ids: list[int]
    types: list[int]  # which of a pair of texts a token is of; [] to models that are not told


def read_classifier(path: str, *, flag: str, label: str | None) -> Classifier:
    """Read what is known of a text classifier before its weights are.

    Raises: InputError if it is none, or has no such label.
    """
    config = read_config(path, flag=flag, kind=REWARD_MODEL, max_len=0)
    names: Any = config.id2label
    chosen = find_label(names, label, flag=f"{flag}={path}")
    tokenizer = from_pretrained(AutoTokenizer, path, flag)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{flag}={path}: needs a fast tokenizer (a tokenizer.json)")
    require_known_ids(tokenizer, config, path=path, flag=flag)
    if tokenizer.chat_template:
        try:
            render(tokenizer, conversation("x", "y"))
        except InputError as error:
            cause = str(error).removesuffix(f"; {REMEDY}")
            told = f"{flag}={path}: cannot write a prompt and a response"
            raise InputError(f"{told}: {cause}") from error
    # A tokenizer that knows no limit says 10^30.
    limits = [n for n in (positions_of(config), tokenizer.model_max_length) if 0 < n < 2**31]
    config.use_cache = False  # of keys and values, which nothing goes on with
    return Classifier(path, config, tokenizer, chosen, names[chosen], min(limits, default=0))


def find_label(names: dict[int, str], label: str | None, *, flag: str) -> int:
    """Find a label by its name, in any case, or its number. Raises: InputError, listing them."""
    known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
    if label is None:
        if len(names) == 1:
            return next(iter(names))
        raise InputError(f"{flag}: has several labels; name one by --reward_label: {known}")
    found = [number for number, name in names.items() if name.casefold() == label.casefold()]
    found = found or [number for number in names if str(number) == label]
    if len(found) != 1:
        raise InputError(f"--reward_label={label}: {flag} has these labels: {known}")
    return found[0]


def conversation(prompt: str, response: str) -> Prompt:
    """Give a prompt and a response as messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def encode_pairs(
    classifier: Classifier, prompts: Sequence[str], responses: Sequence[str]
) -> list[Text]:
    """Tokenise prompts with their responses, cut to what the model can read.

    A special token's name in either is nothing but text.
    """
    tokenizer, most = classifier.tokenizer, classifier.most_tokens
    if tokenizer.chat_template:
        pairs = [conversation(*pair) for pair in zip(prompts, responses, strict=True)]
        rows = encode_by_template(tokenizer, pairs)
        return [Text(ids[-most:], []) for ids in rows]  # the response stays, which comes last
    encoded = tokenizer(
        list(prompts),
        list(responses),
        truncation=most > 0,
        max_length=most or None,
        split_special_tokens=True,
        verbose=False,
    )
    types = encoded.get("token_type_ids") or [[] for _ in prompts]
    return [Text(*row) for row in zip(encoded["input_ids"], types, strict=True)]


def load_classifier(
    classifier: Classifier, *, flag: str, device: torch.device
) -> tuple[Classifier, PreTrainedModel]:
    """Load the weights; the layers on top of the trunk compute in float32.

    Returns the classifier too, with what only the model tells. Raises: InputError.
    """
    auto, config = AutoModelForSequenceClassification, classifier.config
    model = load_weights(auto, classifier.path, flag, config, device).requires_grad_(False)
    for child in model.children():
        for layer in child.modules() if child is not model.base_model else ():
            if isinstance(layer, Linear):
                layer.forward = partial(exact_linear, layer)  # type: ignore[method-assign]
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, Embedding):
            # In RoBERTa's family positions begin behind the pad id.
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            most = min(classifier.most_tokens, table.num_embeddings - first)
            classifier = classifier._replace(most_tokens=most)
    return classifier, model


def score_by_classifier(
    classifier: Classifier, model: PreTrainedModel, *, runtime: Runtime
) -> Scorer:
    """Score by a text classifier, on the texts that people see.

    Texts are padded on the right, where no model's positions are moved by it.
    """
    pad_id = 0 if classifier.one_by_one else classifier.config.pad_token_id

    @torch.no_grad()
    def score(
        prompts: list[str], responses: list[str], batch: Batch, ended: Tensor, room: Room
    ) -> Tensor:
        texts = encode_pairs(classifier, prompts, responses)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row].ids))
        lengths = [len(texts[row].ids) for row in order]
        scores = torch.zeros(len(texts), device=ended.device)
        for part in micro_batches(lengths, Room(1) if classifier.one_by_one else room):
            rows = order[part]
            ids, mask = pad_right([texts[row].ids for row in rows], pad_id)
            inputs = {"input_ids": ids, "attention_mask": mask.long()}
            if texts[0].types:
                inputs["token_type_ids"] = pad_right([texts[row].types for row in rows], 0)[0]
            with runtime.autocast():
                logits = model(**{name: x.to(ended.device) for name, x in inputs.items()}).logits
            scores[rows] = logits[:, classifier.label].float()
        return scores

    return score
