"""Reward model: learn to score a response to a prompt as the annotators did.

    regression   (reward - target)^2, reward = 1 + (max_reward - 1) * sigmoid(logit)
    pairwise     -log sigmoid(logit(better) - logit(worse)), Bradley and Terry
    listwise     the same, as a mean over the pairs of a prompt, whose responses come together

The model is the SFT model with a head that gives one logit, read at the last token that isn't
padding; where EOS pads, that is the one before EOS.
Reads `.data/rm`, and for the last two losses pairs as well, as `.data/pref` has them; writes a
checkpoint for every epoch into `.model/rm`. In a healthy log the loss falls, `eval_accuracy` rises
above 0.5 and above `longer_is_better`, the accuracy of preferring the longer response: a model that
stays below it has learned less than a ruler knows.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.arguments import (
    COMPILING,
    Parser,
    add_boolean,
    add_lora_arguments,
    add_training_arguments,
    check_lora_arguments,
    command,
    count,
    lora_options,
    non_negative,
    nonempty,
    number,
    positive,
    positive_count,
    seed,
    share,
)
from rlhf.batches import Room, build_batch, micro_batches, plan_epochs, sample_length
from rlhf.curves import Panel
from rlhf.errors import InputError, run_script
from rlhf.evaluation import PairAccuracy, pair_accuracy, spearman
from rlhf.lora import add_adapter, trained_share
from rlhf.losses import (
    centering_loss,
    margin_reward_loss,
    pairwise_reward_loss,
    regression_reward_loss,
)
from rlhf.metrics import Metrics, say
from rlhf.models import (
    LANGUAGE_MODEL,
    load_reward_model,
    load_tokenizer,
    prepare_training,
    reward_logits,
)
from rlhf.optim import build_schedule, optimizer_step
from rlhf.processes import main_first, share_of, sum_over_processes
from rlhf.rankings import Ranking, list_pairs, rank_pairs, rank_responses, rows_of_pairs
from rlhf.records import (
    PAIR,
    SCORED,
    changed_since_written,
    fingerprint,
    holds_pairs,
    read_split,
    score_scale,
)
from rlhf.resume import Progress
from rlhf.rewards import pairwise_reward, regression_reward, target_rewards
from rlhf.run_folder import RunFolder
from rlhf.runtime import (
    Runtime,
    require_equal_shares,
    require_whole_models,
    start_runtime,
)
from rlhf.samples import judged_samples, texts_of
from rlhf.sharding import in_step, run_whole, shard
from rlhf.splits import SIDES
from rlhf.tokens import count_dropped, encode_samples
from rlhf.trackers import start_trackers

PANELS = [
    Panel("loss", ["loss", "eval_loss"]),
    Panel("share of pairs in order", ["eval_accuracy", "longer_is_better"]),
    Panel("reward of held-out responses", ["reward_mean"], spread="reward_std"),
    Panel("rank correlation with the scores", ["eval_spearman"]),
    Panel("gradient norm", ["grad_norm"]),
    Panel("learning rate", ["lr"]),
]


def build_parser() -> Parser:
    parser = Parser("Reward model training on scored responses, or on pairs of responses.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of the new head, order and dropout")
    add("--data_dir", type=nonempty, default=".data/rm", help="holds train.jsonl and eval.jsonl")
    add("--sft_model_path", type=nonempty, required=True, help="SFT checkpoint to start from")
    add("--ckpt_dir", type=nonempty, default=".model/rm", help="folder for checkpoints")
    add("--gpu_id", type=count, default=0, help="which CUDA device")
    add("--max_len", type=positive_count, default=1024, help="tokens of prompt and response")
    add("--min_target_len", type=count, default=1, help="least room for a response, in tokens")
    add(
        "--batch_size",
        type=positive_count,
        default=16,
        help="responses, pairs or prompts in a step",
    )
    add("--num_epochs", type=positive_count, default=3, help="passes over the data")
    add("--learning_rate", type=positive, default=1e-5, help="peak learning rate")
    add(
        "--warmup_ratio",
        type=share,
        default=0.0,
        help="share of steps in which the rate rises",
    )
    add("--max_reward", type=number(float, above=1), default=5.0, help="upper end of the rewards")
    losses = ("regression", "pairwise", "listwise")
    help = "predict the score, the better of two, or the order of a prompt's responses"
    add("--loss", choices=losses, default="regression", help=help)
    help = "ask for logits as far apart as the targets of a pair (pairwise, listwise)"
    add_boolean(parser, "--margin", default=False, help=help)
    help = "weight of a pull of the logits' mean to 0 (pairwise, listwise)"
    add("--center_coeff", type=non_negative, default=0.0, help=help)
    add("--dropout", type=share, default=0.0, help="dropout probability")
    add_training_arguments(parser, log_step=10)
    add_lora_arguments(parser, dropout=0.05)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("margin", "center_coeff"):
        value = getattr(args, name)
        if args.loss == "regression" and value != parser.get_default(name):
            told = f"--{name}={str(value).lower()} is for --loss=pairwise and --loss=listwise"
            parser.error(f"{told}: leave it out, or choose one of these")
    return check_lora_arguments(parser, args)


class Responses:
    """Responses as ids, with what is needed to train and to judge a reward model.

    Where the file holds pairs, these and no others are compared: of two responses that were each
    the worse one, nobody has said which is better.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer: PreTrainedTokenizerBase,
        side: str,
        max_samples: int,
    ) -> None:
        self.pairs: list[tuple[int, int]] | None = None  # (better, worse) rows, if the file says
        if holds_pairs(args.data_dir, side):
            records, pairs = rows_of_pairs(read_split(args.data_dir, side, PAIR, max_samples))
        else:
            records, pairs = read_split(args.data_dir, side, SCORED, max_samples), None
        encoded = encode_samples(
            tokenizer,
            [record["prompt"] for record in records],
            [record["response"] for record in records],
            max_len=args.max_len,
            min_len=args.min_target_len,
            data_dir=args.data_dir,
        )
        kept = [row for row, sample in enumerate(encoded) if sample]
        counts = len(kept), len(records)
        if pairs is not None:
            whole = [(i, j) for i, j in pairs if encoded[i] and encoded[j]]
            kept, counts = sorted({*chain.from_iterable(whole)}), (len(whole), len(pairs))
            places = {row: place for place, row in enumerate(kept)}
            self.pairs = [(places[i], places[j]) for i, j in whole]
        room = {"max_len": args.max_len, "min_len": args.min_target_len}
        say(count_dropped(*counts, side=side, **room))
        self.file = Path(args.data_dir) / f"{side}.jsonl"
        self.samples = [sample for row in kept if (sample := encoded[row])]
        self.lengths = [sample_length(sample) for sample in self.samples]
        self.scores = [records[row]["score"] for row in kept]
        self.prompt_ids = [records[row]["prompt_id"] for row in kept]
        self.scale = score_scale(args.data_dir)
        self.targets = target_rewards(self.scores, scale=self.scale, max_reward=args.max_reward)

    def items(self, loss: str) -> list[Ranking]:
        """What --batch_size counts: a response, a pair of them, or all those to one prompt.

        Raises: InputError if nothing can be compared.
        """
        if loss == "regression":
            return [Ranking([row], []) for row in range(len(self.samples))]
        if self.pairs is None:
            rankings = rank_responses(self.prompt_ids, self.scores)
        else:
            rankings = rank_pairs(self.prompt_ids, self.pairs)
        if not rankings:
            raise InputError(
                f"--loss={loss}: no prompt in {self.file} has responses with different scores,"
                " which it compares; give more rows, or --loss=regression"
            )
        if loss == "listwise":
            return rankings
        pairs = chain.from_iterable(ranking.row_pairs() for ranking in rankings)
        return [Ranking([*pair], [(0, 1)]) for pair in pairs]

    def accuracy(self, values: Sequence[float]) -> PairAccuracy:
        """How often the better of two responses has the higher value."""
        if self.pairs is None:
            return pair_accuracy(values, self.scores, self.prompt_ids)
        paired = [values[row] for pair in self.pairs for row in pair]
        groups = [pair for pair in range(len(self.pairs)) for _ in "ab"]
        return pair_accuracy(paired, [1.0, 0.0] * len(self.pairs), groups)

    def correlation(self, values: Sequence[float]) -> float:
        """Spearman's correlation of values and scores; nan for pairs that nobody scored.

        These have the two ends of the scale in place of scores.
        """
        ends = {(self.scores[i], self.scores[j]) for i, j in self.pairs or []}
        return math.nan if ends == {self.scale[::-1]} else spearman(values, self.scores)


def check_form(args: argparse.Namespace) -> None:
    """Stop before scores are learned from pairs, which say only which response is better."""
    for side in SIDES:
        if args.loss == "regression" and holds_pairs(args.data_dir, side):
            raise InputError(
                f"--loss=regression learns scores, but --data_dir={args.data_dir} holds pairs"
                f" ({side}.jsonl): choose --loss=pairwise or --loss=listwise, or rows with scores,"
                " as .data/rm has them"
            )


def main(args: argparse.Namespace) -> None:
    check_form(args)
    runtime = start_runtime(args.gpu_id, dtype=args.dtype, seed=args.seed, report_to=args.report_to)
    require_equal_shares(batch_size=args.batch_size)
    require_whole_models(runtime, use_peft=args.use_peft, compile=args.compile)
    say(runtime.notice)
    check_form(args)
    say(changed_since_written(args.data_dir))
    with RunFolder(
        args.ckpt_dir,
        stage="rm",
        inputs={"--sft_model_path": args.sft_model_path, "--data_dir": args.data_dir},
        arguments=vars(args),
        defaults=vars(parse_args(["--sft_model_path=x"])),
        data={**fingerprint(args.data_dir), "score_scale": list(score_scale(args.data_dir))},
        resume=args.resume,
        keep=args.keep,
        zero_stage=runtime.zero_stage,
    ) as folder:
        if folder.standing == "finished":
            say(folder.finished_line())
        else:
            train(args, runtime, folder)


def train(args: argparse.Namespace, runtime: Runtime, folder: RunFolder) -> None:
    flag, sft_path = "--sft_model_path", args.sft_model_path
    tokenizer = load_tokenizer(sft_path, flag=flag, kind=LANGUAGE_MODEL, max_len=args.max_len)
    with main_first():
        responses = Responses(args, tokenizer, "train", args.max_samples)
        heldout = Responses(args, tokenizer, "eval", 0)
    items, judged = responses.items(args.loss), heldout.items(args.loss)

    pad_id = tokenizer.pad_token_id
    model = load_reward_model(
        sft_path, flag=flag, device=runtime.device, pad_id=pad_id, dropout=args.dropout
    )
    if args.use_peft:
        add_adapter(model, **lora_options(args))
        say(trained_share(model))
    prepare_training(
        model, gradient_checkpointing=args.gradient_checkpointing, compile=args.compile
    )
    say(COMPILING if args.compile else "")
    shard(model, zero_stage=runtime.zero_stage)
    lengths = [max(responses.lengths[row] for row in item.rows) for item in items]
    plan = plan_epochs(
        lengths,
        args.batch_size,
        num_epochs=args.num_epochs,
        max_steps=args.max_steps,
        seed=args.seed,
    )
    num_steps = sum(map(len, plan))
    schedule = build_schedule(
        model.parameters(),
        learning_rate=args.learning_rate,
        num_steps=num_steps,
        warmup_ratio=args.warmup_ratio,
    )
    say(folder.start())
    metrics = Metrics(
        folder.path,
        num_steps=num_steps,
        log_step=args.log_step,
        report=start_trackers(args.report_to, folder=folder.path, arguments=vars(args)),
        console=["loss", "grad_norm", "lr"],
    )
    with Progress(
        folder,
        plan,
        modules={"model": model},
        schedules=[schedule],
        metrics=metrics,
        room=Room(args.micro_batch_size),
        save_every=args.save_every,
        seed=args.seed,
    ) as progress:
        judge = partial(evaluate, args, model, heldout, judged, pad_id, runtime)
        show = partial(judged_samples, *texts_of(tokenizer, heldout.samples))
        if not metrics.rows:
            results, reward, rewards = progress.fitting(judge)
            num_pairs, num_ties = reward["num_pairs"], reward["num_ties"]
            say(f"eval_accuracy: over {num_pairs} pairs of responses; {num_ties} tie")
            metrics.add_epoch(0, results, show(reward=rewards, target=heldout.targets))
        add = partial(add_gradient, args, model, responses, pad_id, runtime)
        for epoch, batches in progress.left():
            model.train()
            for batch, done in batches:
                here = [items[item] for item in batch]
                loss = progress.fitting(partial(add, here))
                learning_rate = schedule.get_last_lr()[0]
                with progress.whole():
                    grad_norm = optimizer_step(
                        [schedule],
                        loss,
                        max_gradient_norm=args.max_gradient_norm,
                        where=f"step {metrics.step + 1}, rows {[item.rows for item in here]}",
                    )
                    metrics.add(
                        {"loss": loss, "grad_norm": grad_norm, "lr": learning_rate},
                        epoch=done,
                        num_tokens=sum(responses.lengths[row] for row in rows_of(here)),
                    )
            results, reward, rewards = progress.fitting(judge)
            with progress.whole():
                folder.save_epoch(
                    model,
                    tokenizer,
                    epoch=epoch,
                    figure=f"loss={results['eval_loss']:.4f}",
                    objective=results["eval_loss"],
                    facts={
                        "metrics": results,
                        "before_training": metrics.rows[0],
                        "reward": reward,
                    },
                )
                metrics.add_epoch(epoch, results, show(reward=rewards, target=heldout.targets))
    metrics.finish(
        PANELS,
        best=folder.path / "best",
        next_step=command(
            "exec_run_ppo.sh",
            sft_model_path=(sft_path, ".model/sft/best"),
            rm_model_path=(str(folder.path / "best"), ".model/rm/best"),
            data_dir=(str(Path(args.data_dir).parent / "pref"), ".data/pref"),
            max_len=(args.max_len, 1024),
            max_reward=(args.max_reward, 5.0),
            use_peft=(args.use_peft, False),
            share_trunk=(args.use_peft, False),
        ),
    )
    folder.finish()


def add_gradient(
    args: argparse.Namespace,
    model: PreTrainedModel,
    responses: Responses,
    pad_id: int,
    runtime: Runtime,
    items: list[Ranking],
    room: Room,
) -> Tensor:
    """Add the gradient of an optimisation batch to the weights'; returns its loss."""
    loss = torch.zeros((), device=runtime.device)
    own = share_of(items)
    lengths = [max(responses.lengths[row] for row in item.rows) for item in own]
    most = max(len(item.rows) for item in items)
    parts = micro_batches(lengths, room, sequences_per_row=most)
    for some, weight in in_step(model, own, parts, spare=items[0]):
        rows = rows_of(some)
        logits = run_whole(model, score_rows, responses, rows, pad_id, runtime)
        losses = item_losses(args, some, logits, responses.targets[rows].to(logits.device))
        part_loss = weight * losses.sum() / len(items)
        part_loss.backward()
        loss += part_loss.detach()
    return sum_over_processes(loss)


def rows_of(items: Sequence[Ranking]) -> list[int]:
    """The rows of some items, one after another."""
    return list(chain.from_iterable(item.rows for item in items))


def item_losses(
    args: argparse.Namespace,
    items: Sequence[Ranking],
    logits: Tensor,  # (S,)  of the items' rows, one after another
    targets: Tensor,  # (S,)
) -> Tensor:  # (number of items,)
    """The objective of each item; of several pairs, the mean."""
    if args.loss == "regression":
        rewards = regression_reward(logits, max_reward=args.max_reward)
        return regression_reward_loss(rewards, targets)
    starts = torch.tensor([0, *accumulate(len(item.rows) for item in items)], device=logits.device)
    pairs = list_pairs(item.pairs for item in items)
    owners, *positions = torch.tensor(pairs, device=logits.device).T  # (N,) each
    better, worse = (starts[owners] + position for position in positions)
    if args.margin:
        margins = targets[better] - targets[worse]
        losses = margin_reward_loss(logits[better], logits[worse], margins)  # (N,)
    else:
        losses = pairwise_reward_loss(logits[better], logits[worse])  # (N,)
    if args.center_coeff:
        losses = losses + args.center_coeff * centering_loss(logits[better], logits[worse])
    sums = torch.zeros(len(items), device=logits.device).index_add(0, owners, losses)
    return sums / torch.bincount(owners)


def score_rows(
    model: PreTrainedModel, responses: Responses, rows: list[int], pad_id: int, runtime: Runtime
) -> Tensor:  # (B,)
    batch = build_batch([responses.samples[row] for row in rows], pad_id)
    with runtime.autocast():
        return reward_logits(model, batch.to(runtime.device), pad_id=pad_id)


@torch.no_grad()
def evaluate(
    args: argparse.Namespace,
    model: PreTrainedModel,
    heldout: Responses,
    items: list[Ranking],
    pad_id: int,
    runtime: Runtime,
    room: Room,
) -> tuple[dict[str, float], dict[str, object], Tensor]:
    """Judge the model on held-out responses: metrics, what PPO must know of it, the rewards.

    Mean and standard deviation of logit and reward are taken over these responses too: they are of
    the kind that the SFT model has learned to write.
    """
    model.eval()
    logits = torch.zeros(len(heldout.samples), device=runtime.device)
    order = share_of(sorted(range(len(heldout.samples)), key=heldout.lengths.__getitem__))
    parts = micro_batches([heldout.lengths[row] for row in order], room)
    for rows, weight in in_step(model, order, parts, spare=0):
        logits[rows] += weight * run_whole(model, score_rows, heldout, rows, pad_id, runtime)
    logits = sum_over_processes(logits).cpu()
    logit_mean = float(logits.mean())
    if args.loss == "regression":
        rewards = regression_reward(logits, max_reward=args.max_reward)
    else:
        rewards = pairwise_reward(logits, logit_mean=logit_mean, max_reward=args.max_reward)
    rows = rows_of(items)
    losses = item_losses(args, items, logits[rows], heldout.targets[rows])
    accuracy = heldout.accuracy(logits.tolist())
    lengths = [len(sample.response_ids) for sample in heldout.samples]
    metrics = {
        "eval_loss": float(losses.mean()),
        "eval_accuracy": accuracy.accuracy,
        "longer_is_better": heldout.accuracy(lengths).accuracy,
        "eval_spearman": heldout.correlation(logits.tolist()),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
    }
    reward = {
        "loss": args.loss,
        "max_reward": args.max_reward,
        "score_scale": list(score_scale(args.data_dir)),
        "logit_mean": logit_mean,
        "logit_std": float(logits.std()),
        "reward_mean": metrics["reward_mean"],
        "reward_std": metrics["reward_std"],
        "num_pairs": accuracy.num_pairs,
        "num_ties": accuracy.num_ties,
    }
    return metrics, reward, rewards


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
