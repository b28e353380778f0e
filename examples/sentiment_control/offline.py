"""Prepare the example without a network: texts, a tokenizer, a base model and a classifier.

The classifier learns here, from texts of every strength, each with its rating. The base model's
weights are noise: run_sft.py teaches it to write.
"""

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from examples.sentiment_control.queries import NUM_TRAIN, cut, write_prompts
from examples.sentiment_control.remarks import any_remark, rating, usual_remark
from examples.sentiment_control.reward import REWARDS
from rlhf.arguments import Parser, seed
from rlhf.errors import run_script
from rlhf.records import write_records

EOS = "<|endoftext|>"
NUM_TEXTS = 10_000  # for each of the two models
NUM_EPOCHS, BATCH_SIZE = 6, 64  # of the classifier


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, as GPT-2's is; every word of the texts becomes a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    within = [" " + text for text in texts]  # as a query stands behind its control token
    tokenizer.train_from_iterator([*texts, *within, *REWARDS], trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def train_classifier(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> DistilBertForSequenceClassification:
    """Train a small DistilBERT to tell the rating of a text, by squared error."""
    model = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            dim=64,
            hidden_dim=128,
            n_layers=2,
            n_heads=2,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (N, T) each
    ratings = torch.tensor([rating(text) for text in texts])  # (N,)
    num_steps = NUM_EPOCHS * len(texts) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    for step in range(num_steps):
        rows = torch.randint(len(texts), (BATCH_SIZE,))
        loss = (model(ids[rows], mask[rows]).logits[:, 0] - ratings[rows]).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"classifier: step {step + 1}/{num_steps}  loss {loss:.4f}", flush=True)
    return model


def build_base_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Build a GPT-2 of two layers, whose weights are noise."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def write_texts(
    folder: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: random.Random
) -> None:
    """Write texts for run_sft.py. Their control tokens are drawn blindly: they mean nothing yet."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": rng.choice(list(REWARDS)) + query, "response": response, "score": 10}
        for query, response in filter(None, (cut(tokenizer, text) for text in texts))
    ]
    write_records(folder / "eval.jsonl", rows[::20])
    write_records(folder / "train.jsonl", [row for i, row in enumerate(rows) if i % 20])


def main(args: argparse.Namespace) -> None:
    disable_progress_bar()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    usual = [usual_remark(rng) for _ in range(NUM_TEXTS)]
    graded = [any_remark(rng) for _ in range(NUM_TEXTS)]
    tokenizer = train_tokenizer(usual + graded)
    write_texts(args.data_dir / "sft", tokenizer, usual, rng)
    more = (cut(tokenizer, usual_remark(rng)) for _ in range(5 * NUM_TRAIN))
    write_prompts(args.data_dir / "ppo", (query for query, _ in filter(None, more)), rng)
    build_base_model(tokenizer).save_pretrained(args.model_dir / "gpt2-remarks")
    tokenizer.save_pretrained(args.model_dir / "gpt2-remarks")
    cuts = filter(None, (cut(tokenizer, text) for text in graded))
    classifier = train_classifier(tokenizer, ["".join(parts).strip() for parts in cuts])
    classifier.save_pretrained(args.model_dir / "classifier")
    tokenizer.save_pretrained(args.model_dir / "classifier")


if __name__ == "__main__":
    parser = Parser(description="Prepare the example without a network.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of texts and weights")
    add("--data_dir", type=Path, default=Path(".data/sentiment"), help="folder for the texts")
    add("--model_dir", type=Path, default=Path(".model/sentiment"), help="folder for the models")
    run_script(lambda: main(parser.parse_args()))
