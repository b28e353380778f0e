"""Supervised fine-tuning: teach a pretrained language model to answer in the form of the data.

    loss = -mean over the response tokens of log p(token | prompt, tokens before it)

The mean runs over all response tokens of the optimisation batch, closing tag and EOS included;
prompts are read but not learned. Reads `.data/sft`, writes a checkpoint for every epoch into
`.model/sft`. In a healthy log the loss falls quickly over the first hundred steps and slowly then;
`eval_loss` falls with it, and turns up where the model begins to memorise: `best` is the epoch
before that.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.arguments import (
    COMPILING,
    Parser,
    add_lora_arguments,
    add_training_arguments,
    check_lora_arguments,
    command,
    count,
    lora_options,
    nonempty,
    positive,
    positive_count,
    seed,
    share,
)
from rlhf.batches import Batch, Room, build_batch, micro_batches, plan_epochs, sample_length
from rlhf.curves import Panel
from rlhf.errors import run_script
from rlhf.heads import head_of
from rlhf.logprobs import token_logprobs
from rlhf.lora import add_adapter, trained_share
from rlhf.masked import masked_sum
from rlhf.metrics import Metrics, say
from rlhf.models import (
    LANGUAGE_MODEL,
    load_policy,
    load_tokenizer,
    prepare_training,
    response_states,
    set_generation_defaults,
)
from rlhf.optim import build_schedule, optimizer_step
from rlhf.processes import main_first, share_of, sum_over_processes
from rlhf.records import SCORED, changed_since_written, fingerprint, read_split
from rlhf.resume import Progress
from rlhf.run_folder import RunFolder
from rlhf.runtime import (
    Runtime,
    require_equal_shares,
    require_whole_models,
    start_runtime,
)
from rlhf.samples import write_samples
from rlhf.sharding import in_step, run_whole, shard
from rlhf.tokens import Sample, count_dropped, encode_samples
from rlhf.trackers import start_trackers

PANELS = [
    Panel("loss of a response token", ["loss", "eval_loss"]),
    Panel("gradient norm", ["grad_norm"]),
    Panel("learning rate", ["lr"]),
]


def build_parser() -> Parser:
    parser = Parser("Supervised fine-tuning of a causal language model on .data/sft.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of order and dropout")
    add("--data_dir", type=nonempty, default=".data/sft", help="holds train.jsonl and eval.jsonl")
    add("--ckpt_dir", type=nonempty, default=".model/sft", help="folder for checkpoints")
    add(
        "--model_id",
        type=nonempty,
        default="openai-community/gpt2",
        help="base model: Hub id or folder",
    )
    add(
        "--chat_template",
        type=nonempty,
        default="auto",
        help="form of a conversation: auto (the tokenizer's own, else tags), tags, or a Jinja file",
    )
    add("--gpu_id", type=count, default=0, help="which CUDA device")
    add("--max_len", type=positive_count, default=1024, help="tokens of prompt and response")
    add("--min_gen_len", type=count, default=1, help="least room for a response, in tokens")
    add("--batch_size", type=positive_count, default=16, help="sequences in an optimiser step")
    add("--num_epochs", type=positive_count, default=5, help="passes over the data")
    add("--learning_rate", type=positive, default=2e-5, help="peak learning rate")
    add(
        "--warmup_ratio",
        type=share,
        default=0.1,
        help="share of steps in which the rate rises",
    )
    add("--dropout", type=share, default=0.0, help="dropout probability")
    add_training_arguments(parser, log_step=10)
    add_lora_arguments(parser, dropout=0.05)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    return check_lora_arguments(parser, parser.parse_args(argv))


def load_samples(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, side: str, max_samples: int
) -> list[Sample]:
    records = read_split(args.data_dir, side, SCORED, max_samples)
    encoded = encode_samples(
        tokenizer,
        [record["prompt"] for record in records],
        [record["response"] for record in records],
        max_len=args.max_len,
        min_len=args.min_gen_len,
        data_dir=args.data_dir,
    )
    samples = [sample for sample in encoded if sample]
    room = {"max_len": args.max_len, "min_len": args.min_gen_len}
    say(count_dropped(len(samples), len(records), side=side, **room))
    return samples


def main(args: argparse.Namespace) -> None:
    runtime = start_runtime(args.gpu_id, dtype=args.dtype, seed=args.seed, report_to=args.report_to)
    require_equal_shares(batch_size=args.batch_size)
    require_whole_models(runtime, use_peft=args.use_peft, compile=args.compile)
    say(runtime.notice)
    say(changed_since_written(args.data_dir))
    inputs = {"--model_id": args.model_id, "--data_dir": args.data_dir}
    if args.chat_template not in ("auto", "tags"):
        inputs["--chat_template"] = args.chat_template
    with RunFolder(
        args.ckpt_dir,
        stage="sft",
        inputs=inputs,
        arguments=vars(args),
        defaults=vars(parse_args([])),
        data=fingerprint(args.data_dir),
        resume=args.resume,
        keep=args.keep,
        zero_stage=runtime.zero_stage,
    ) as folder:
        if folder.standing == "finished":
            say(folder.finished_line())
        else:
            train(args, runtime, folder)


def train(args: argparse.Namespace, runtime: Runtime, folder: RunFolder) -> None:
    tokenizer = load_tokenizer(
        args.model_id,
        flag="--model_id",
        kind=LANGUAGE_MODEL,
        max_len=args.max_len,
        chat_template=args.chat_template,
    )
    pad_id = tokenizer.pad_token_id
    with main_first():
        samples = load_samples(args, tokenizer, "train", args.max_samples)
        heldout = load_samples(args, tokenizer, "eval", 0)

    model = load_policy(
        args.model_id, flag="--model_id", device=runtime.device, dropout=args.dropout
    )
    if args.use_peft:
        add_adapter(model, **lora_options(args))
        say(trained_share(model))
    prepare_training(
        model, gradient_checkpointing=args.gradient_checkpointing, compile=args.compile
    )
    say(COMPILING if args.compile else "")
    set_generation_defaults(model, tokenizer)
    shard(model, zero_stage=runtime.zero_stage)
    lengths = [sample_length(sample) for sample in samples]
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
        judge = partial(evaluate, model, heldout, pad_id, runtime)
        sizes = {"max_len": args.max_len, "seed": args.seed}
        write = partial(write_samples, model, tokenizer, heldout, runtime, **sizes)
        if not metrics.rows:
            results = progress.fitting(judge)
            metrics.add_epoch(0, results, progress.fitting(write) if metrics.report else [])
        for epoch, batches in progress.left():
            model.train()
            for rows, done in batches:
                batch = [samples[row] for row in rows]
                loss = progress.fitting(partial(add_gradient, model, batch, pad_id, runtime))
                learning_rate = schedule.get_last_lr()[0]
                with progress.whole():
                    grad_norm = optimizer_step(
                        [schedule],
                        loss,
                        max_gradient_norm=args.max_gradient_norm,
                        where=f"step {metrics.step + 1}, rows {rows}",
                    )
                    metrics.add(
                        {"loss": loss, "grad_norm": grad_norm, "lr": learning_rate},
                        epoch=done,
                        num_tokens=sum(lengths[row] for row in rows),
                    )
            results = progress.fitting(judge)
            shown = progress.fitting(write) if metrics.report else []
            with progress.whole():
                folder.save_epoch(
                    model,
                    tokenizer,
                    epoch=epoch,
                    figure=f"loss={results['eval_loss']:.4f}",
                    objective=results["eval_loss"],
                    facts={"metrics": results, "before_training": metrics.rows[0]},
                )
                metrics.add_epoch(epoch, results, shown)
    metrics.finish(
        PANELS,
        best=folder.path / "best",
        next_step=command(
            "exec_run_rm.sh",
            sft_model_path=(str(folder.path / "best"), ".model/sft/best"),
            data_dir=(str(Path(args.data_dir).parent / "rm"), ".data/rm"),
            max_len=(args.max_len, 1024),
            use_peft=(args.use_peft, False),
        ),
    )
    folder.finish()


def add_gradient(
    model: PreTrainedModel, samples: list[Sample], pad_id: int, runtime: Runtime, room: Room
) -> Tensor:
    """Add the gradient of an optimisation batch to the weights'; returns its loss."""
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    loss = torch.zeros((), device=runtime.device)
    own = share_of(samples)
    parts = micro_batches([sample_length(sample) for sample in own], room)
    for some, weight in in_step(model, own, parts, spare=samples[0]):
        batch = build_batch(some, pad_id).to(runtime.device)
        part_loss = weight * run_whole(model, summed_loss, batch, runtime) / num_tokens
        part_loss.backward()
        loss += part_loss.detach()
    return sum_over_processes(loss)


def summed_loss(model: PreTrainedModel, batch: Batch, runtime: Runtime) -> Tensor:
    """Cross-entropy summed over the response tokens of a micro-batch."""
    with runtime.autocast():
        states = response_states(model, batch)  # (B, R, D)
    head = head_of(model)
    logprobs = token_logprobs(
        states, batch.response_ids, batch.response_mask, head, temperature=1.0
    )  # (B, R)
    return -masked_sum(logprobs, batch.response_mask)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    samples: list[Sample],
    pad_id: int,
    runtime: Runtime,
    room: Room,
) -> dict[str, float]:
    """Mean loss of a response token on held-out rows, and its exponential."""
    model.eval()
    lengths = [sample_length(sample) for sample in samples]
    order = share_of(sorted(range(len(samples)), key=lengths.__getitem__))
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    parts = micro_batches([lengths[row] for row in order], room)
    for rows, weight in in_step(model, order, parts, spare=0):
        batch = build_batch([samples[row] for row in rows], pad_id)
        total += weight * run_whole(model, summed_loss, batch.to(runtime.device), runtime)
    loss = float(sum_over_processes(total)) / sum(len(sample.response_ids) for sample in samples)
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
