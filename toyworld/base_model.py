"""The base model: a word-level tokenizer and a small GPT-2 whose weights are seeded noise."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from toyworld.world import EOS, TAGS, UNKNOWN, VOCABULARY


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each word and tag of the world.

    Tags are words like any other, found without spaces around them. The bar is cut off, so that an
    EOS typed as plain text falls into unknown pieces and never becomes the real EOS.
    """
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join((*TAGS, r"\|"))), "isolated"),
            pre_tokenizers.WhitespaceSplit(),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> GPT2LMHeadModel:
    """Build a GPT-2 of two layers whose weights depend on `seed` alone.

    They are wider than GPT-2's own 0.02, which suits its width of 768: with it a model of width 64
    takes far longer to learn who is addressed.
    """
    eos = VOCABULARY.index(EOS)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def save_base_model(path: Path, seed: int) -> None:
    """Write model and tokenizer as one `save_pretrained` folder."""
    disable_progress_bar()  # of a file that is written in milliseconds
    build_model(seed).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
