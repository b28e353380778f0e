"""Pairs of a model's own responses, judged by an annotator: the data that DPO's theory asks for.

    python -m toyworld.pairs --sft_model_path .model/toyworld/sft/best
    python -m toyworld.pairs --sft_model_path .model/toyworld/sft/best --num_responses 6

Every pair is two responses of the SFT model to one prompt. The `bradley-terry` annotator prefers
y to y' with probability sigmoid(s * (r(y) - r(y'))), s = 1 / NOISE = 2, whatever the pair; then the
minimum of DPO's loss at beta_DPO = s * beta is the optimum of E[r] - beta * KL (2305.18290,
section 4). Where the better one always wins, there is no finite minimum.

The theory needs pairs from everywhere that the model goes. So responses that did not end are data
too, and cost the Bradley-Terry annotator's favour what they cost PPO; `--max_len` cuts them again
where training reads them. Not written down can be an EOS without the closing tag before it, and the
empty response, which `min_gen_len` forbids. Scores are clipped to 1 to 10: a penalty above 1 would
leave the annotator's range.

`--num_responses` writes scored rows instead, for losses that rank all responses to a prompt.
"""

import argparse
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.arguments import Parser, count, non_negative, positive, positive_count
from rlhf.errors import run_script
from rlhf.records import PairRecord, ScoredRecord, prompt_id, write_records
from toyworld.annotators import ANNOTATORS, annotate
from toyworld.measure import EOS_ID, Model, load_policy, load_tokenizer, read_prompts, sample
from toyworld.world import EOS, MAX_RESPONSE_TOKENS, TAGS, VOCABULARY, gold_reward, requests

CHUNK = 2048  # prompts that are answered together: memory only


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = Parser("Write pairs of a model's own responses, as an annotator prefers them.")
    parser.prog = "toyworld.pairs"
    add = parser.add_argument
    add("--sft_model_path", required=True, help="who answers, and later DPO's reference")
    add("--data_dir", default=".data/toyworld/pref", help="its prompts are used, each many times")
    add("--out_dir", default=".data/toyworld/pairs", help="folder for train.jsonl and eval.jsonl")
    add("--num_pairs", type=positive_count, default=20_000, help="to draw for training")
    add("--num_responses", type=count, default=0, help="write scored rows, so many to a prompt")
    add("--max_samples", type=count, default=0, help="training prompts to use (0 = all)")
    add("--annotator", choices=ANNOTATORS, default="bradley-terry", help="who judges")
    add("--temperature", type=positive, default=1.25, help="of the responses")
    add("--missing_eos_penalty", type=non_negative, default=1.0, help="as in PPO")
    add("--seed", type=count, default=42, help="of responses and noise")
    args = parser.parse_args(argv)
    if Path(args.out_dir).exists() and not Path(args.out_dir).is_dir():
        parser.error(f"--out_dir={args.out_dir} is a file; give a folder")
    if args.num_responses and args.num_pairs != parser.get_default("num_pairs"):
        parser.error(f"--num_pairs={args.num_pairs} has no meaning with --num_responses; leave out")
    return args


def main(args: argparse.Namespace) -> None:
    """Write both sides aside, then put them in the place of those that were there."""
    flag = "--sft_model_path"
    policy = load_policy(args.sft_model_path, flag=flag)
    tokenizer = load_tokenizer(args.sft_model_path, flag=flag)
    prompts = {side: read_prompts(args.data_dir, side) for side in ("train", "eval")}
    prompts["train"] = prompts["train"][: args.max_samples or None]
    out_dir = Path(args.out_dir)
    partial = out_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.manual_seed(args.seed)
    noise = random.Random(args.seed)
    num_pairs = {"train": args.num_pairs, "eval": max(args.num_pairs // 10, 1)}
    for side, some in prompts.items():
        path = partial / f"{side}.jsonl"
        if args.num_responses:
            rows = draw_rows(args, policy, tokenizer, some, noise)
            written, drawn = write_records(path, rows), args.num_responses * len(some)
            print(f"{side}: {written} responses of {drawn} drawn; twins are left out")
        else:
            asked = [some[i % len(some)] for i in range(num_pairs[side])]
            pairs = draw_pairs(args, policy, tokenizer, asked, noise)
            written = write_records(path, pairs)
            print(f"{side}: {written} pairs of {len(asked)} drawn; twins and ties are left out")
    for side in prompts:
        (partial / f"{side}.jsonl").replace(out_dir / f"{side}.jsonl")
    partial.rmdir()


def draw_liked(
    args: argparse.Namespace,
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[str],
    noise: random.Random,
    *,
    num_responses: int,
) -> Iterator[tuple[str, list[tuple[float, str]]]]:
    """Yield each prompt with what was said, and how it is liked; what no text tells is left out."""
    for start in range(0, len(asked), CHUNK):
        prompts = asked[start : start + CHUNK]
        sequences = sample(
            policy,
            tokenizer,
            [prompt for prompt in prompts for _ in range(num_responses)],
            temperature=args.temperature,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )
        responses = [
            ids[mask].tolist()
            for ids, mask in zip(sequences.ids, sequences.response_mask, strict=True)
        ]
        for i, prompt in enumerate(prompts):
            liked = [
                (score(args, prompt, text, noise, ended=ids[-1] == EOS_ID), text)
                for ids in responses[num_responses * i : num_responses * (i + 1)]
                if (text := as_text(ids)) is not None
            ]
            yield prompt, liked


def draw_pairs(
    args: argparse.Namespace,
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[str],
    noise: random.Random,
) -> Iterator[PairRecord]:
    """Yield a pair for each prompt whose two responses differ, and are not liked alike."""
    for prompt, liked in draw_liked(args, policy, tokenizer, asked, noise, num_responses=2):
        if len(liked) < 2 or liked[0][1] == liked[1][1] or liked[0][0] == liked[1][0]:
            continue
        (low, rejected), (high, chosen) = sorted(liked)
        yield PairRecord(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            chosen_score=high,
            rejected_score=low,
            source=source(prompt),
            prompt_id=prompt_id(prompt),
        )


def draw_rows(
    args: argparse.Namespace,
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[str],
    noise: random.Random,
) -> Iterator[ScoredRecord]:
    """Yield the different responses to each prompt, each with the score it was given first."""
    n = args.num_responses
    for prompt, liked in draw_liked(args, policy, tokenizer, asked, noise, num_responses=n):
        scores: dict[str, float] = {}
        for given, text in liked:
            scores.setdefault(text, given)
        for text, given in scores.items():
            yield ScoredRecord(
                prompt=prompt,
                response=text,
                score=given,
                source=source(prompt),
                prompt_id=prompt_id(prompt),
            )


def source(prompt: str) -> str:
    """Name where a prompt comes from, as the world's own rows do."""
    return f"toyworld_{requests()[prompt].task}"


def score(
    args: argparse.Namespace, prompt: str, response: str, noise: random.Random, *, ended: bool
) -> float:
    """Return the annotator's score of a response, 1 to 10."""
    (gold,) = gold_reward([prompt], [response])
    if not ended:
        gold -= args.missing_eos_penalty
    return float(annotate(args.annotator, gold, response, noise)["overall_score"])


def as_text(ids: list[int]) -> str | None:
    """Return the text from which the training scripts make these ids; None if there is none.

    A response that did not end is written out, to be cut where it was cut before.

    >>> hi, bye, tag, eos = map(VOCABULARY.index, ("hi", "bye", TAGS[-1], EOS))
    >>> [as_text(ids) for ids in ([hi, tag, eos], [hi, eos], [tag, eos], [hi, bye, tag, hi])]
    ['hi', None, None, 'hi bye </response> hi']
    """
    words = [VOCABULARY[i] for i in ids]
    if words[-1] == EOS:
        words, ending = words[:-2], words[-2:]
        if ending[0] != TAGS[-1] or not words:
            return None
    return " ".join(words)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
