"""Prepare the example from the Hugging Face Hub: film reviews, a GPT-2 that has read them, and a
DistilBERT that judges them. A folder may stand in the place of each."""

import argparse
import random
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from examples.sentiment_control.queries import TEMPLATE, cut, write_prompts
from rlhf.arguments import Parser, nonempty, seed
from rlhf.errors import run_script
from rlhf.models import from_pretrained
from rlhf.templates import prepare_tokenizer


def main(args: argparse.Namespace) -> None:
    disable_progress_bar()
    # run_ppo.py reads safetensors alone; older checkpoints hold weights that need unpickling, which
    # transformers does in torch's safe way. Saved again, they are safetensors.
    tokenizer = prepare_tokenizer(from_pretrained(AutoTokenizer, args.policy, "--policy"), TEMPLATE)
    classifier_tokenizer = from_pretrained(AutoTokenizer, args.classifier, "--classifier")
    for kind, name, own in (
        (AutoModelForCausalLM, "policy", tokenizer),
        (AutoModelForSequenceClassification, "classifier", classifier_tokenizer),
    ):
        model = from_pretrained(kind, getattr(args, name), f"--{name}", dtype=torch.float32)
        model.save_pretrained(args.model_dir / name)
        own.save_pretrained(args.model_dir / name)

    rng = random.Random(args.seed)
    reviews = list(load_dataset(args.reviews, split="train")["text"])
    texts = (review[:500].replace("<br />", " ") for review in rng.sample(reviews, len(reviews)))
    cuts = filter(None, (cut(tokenizer, text) for text in texts))
    write_prompts(args.data_dir / "ppo", (query for query, _ in cuts), rng)


if __name__ == "__main__":
    parser = Parser(description="Prepare the example from the Hugging Face Hub.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of the choice of queries")
    add("--data_dir", type=Path, default=Path(".data/sentiment-imdb"), help="folder for prompts")
    add("--model_dir", type=Path, default=Path(".model/sentiment-imdb"), help="folder for models")
    add("--reviews", type=nonempty, default="stanfordnlp/imdb", help="texts: Hub id or folder")
    add("--policy", type=nonempty, default="lvwerra/gpt2-imdb", help="Hub id or folder")
    add("--classifier", type=nonempty, default="lvwerra/distilbert-imdb", help="Hub id or folder")
    run_script(lambda: main(parser.parse_args()))
