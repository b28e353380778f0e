"""DPO: learn from pairs of a better and a worse response, without a reward model.

    loss = -log sigmoid(beta * ((log pi(chosen) - log ref(chosen))
                                - (log pi(rejected) - log ref(rejected))))

The reference is the SFT model that training starts from; its logprobs are computed once. Reads
`.data/pref`, writes a checkpoint for every epoch into `.model/dpo`. In a healthy log the loss
starts at ln 2 = 0.693 and falls, `rewards/accuracies` and `rewards/margins` rise. Watch
`logps/chosen` too: if it sinks far below its start, the policy forgets good responses along with
bad ones, and a larger beta or a lower learning rate is due.
"""

import argparse
import hashlib
import math
from array import array
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.arguments import (
    Parser,
    add_lora_arguments,
    add_training_arguments,
    check_lora_arguments,
    count,
    lora_options,
    nonempty,
    positive,
    positive_count,
    seed,
)
from rlhf.batches import Room, build_batch, micro_batches, plan_epochs, sample_length
from rlhf.checkpoints import load_tensors, save_tensors, weights_fingerprint
from rlhf.earlier import RESUME
from rlhf.errors import RunError, run_script
from rlhf.heads import head_of
from rlhf.logprobs import sequence_logprobs, token_logprobs
from rlhf.lora import active, add_adapter, trained_share
from rlhf.losses import dpo_loss
from rlhf.memory import fit
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
from rlhf.processes import main_first, most_of_processes, share_of, sum_over_processes
from rlhf.records import PAIR, changed_since_written, fingerprint, read_split
from rlhf.resume import Progress
from rlhf.run_folder import RunFolder
from rlhf.runtime import (
    Runtime,
    require_equal_shares,
    require_whole_models,
    start_runtime,
    start_trackers,
)
from rlhf.sharding import in_step, run_whole, shard
from rlhf.tokens import Sample, count_dropped, encode_samples

Pair = tuple[Sample, Sample]  # chosen, rejected
TERMS = (  # of each pair, under TRL's names
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def build_parser() -> Parser:
    parser = Parser("Direct preference optimisation on the pairs of .data/pref.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of the order")
    add("--sft_model_path", type=nonempty, required=True, help="SFT checkpoint, also the reference")
    add("--ckpt_dir", type=nonempty, default=".model/dpo", help="folder for checkpoints")
    add("--gpu_id", type=count, default=0, help="which CUDA device")
    add("--data_dir", type=nonempty, default=".data/pref", help="holds train.jsonl and eval.jsonl")
    add("--max_len", type=positive_count, default=1024, help="tokens of prompt and response")
    add("--min_gen_len", type=count, default=1, help="least room for a response, in tokens")
    add("--num_epochs", type=positive_count, default=1, help="passes over the data")
    add("--batch_size", type=positive_count, default=16, help="pairs in an optimiser step")
    add("--learning_rate", type=positive, default=1e-5, help="learning rate at the start")
    add("--beta", type=positive, default=0.2, help="how strongly the reference holds")
    add("--loss", choices=("dpo",), default="dpo", help="preference loss")
    names = ["--log_step", "--logging_steps"]
    add_training_arguments(parser, log_step=100, log_step_names=names)
    add_lora_arguments(parser, dropout=0.0)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    return check_lora_arguments(parser, parser.parse_args(argv))


def load_pairs(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, side: str, max_samples: int
) -> list[Pair]:
    records = read_split(args.data_dir, side, PAIR, max_samples)
    prompts = [record["prompt"] for record in records]
    sizes = {"max_len": args.max_len, "min_len": args.min_gen_len}
    chosen, rejected = (
        encode_samples(
            tokenizer, prompts, [r[name] for r in records], **sizes, data_dir=args.data_dir
        )
        for name in ("chosen", "rejected")
    )
    pairs = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a and b]
    say(count_dropped(len(pairs), len(records), side=side, **sizes))
    return pairs


def main(args: argparse.Namespace) -> None:
    runtime = start_runtime(args.gpu_id, dtype=args.dtype, seed=args.seed, report_to=args.report_to)
    require_equal_shares(batch_size=args.batch_size)
    require_whole_models(runtime, use_peft=args.use_peft, compile=args.compile)
    say(runtime.notice)
    say(changed_since_written(args.data_dir))
    with RunFolder(
        args.ckpt_dir,
        stage="dpo",
        inputs={"--sft_model_path": args.sft_model_path, "--data_dir": args.data_dir},
        arguments=vars(args),
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
    flag, sft_path = "--sft_model_path", args.sft_model_path
    tokenizer = load_tokenizer(sft_path, flag=flag, kind=LANGUAGE_MODEL, max_len=args.max_len)
    with main_first():
        pairs = load_pairs(args, tokenizer, "train", args.max_samples)
        heldout = load_pairs(args, tokenizer, "eval", 0)

    # Every dropout is at 0: policy and reference are the same function until the first update, and
    # so the policy can compute the reference's logprobs before it is trained.
    policy = load_policy(sft_path, flag=flag, device=runtime.device).train()
    made_from = {"sha256": reference_fingerprint(policy, pairs, heldout, runtime)}
    if args.use_peft:
        add_adapter(policy, **lora_options(args))
        say(trained_share(policy))
    prepare_training(
        policy, gradient_checkpointing=args.gradient_checkpointing, compile=args.compile
    )
    set_generation_defaults(policy, tokenizer)
    pad_id = tokenizer.pad_token_id
    room, cache = Room(args.micro_batch_size), folder.path / RESUME / "ref_logprobs"
    cached = load_tensors(cache, device=runtime.device)
    is_cached = cached is not None and cached[1] == made_from
    if not any(most_of_processes([not is_cached], runtime.device)):  # each of them has it
        ref_logprobs = cached[0]
    else:
        ref_logprobs = {}  # (number of pairs, 2) each
        for side, some in (("train", pairs), ("eval", heldout)):
            compute = partial(all_logprobs, policy, pad_id, runtime, some)
            with active(policy, None):
                ref_logprobs[side], room = fit(compute, room, runtime.device)
    shard(policy, zero_stage=runtime.zero_stage)
    lengths = [max(map(sample_length, pair)) for pair in pairs]
    plan = plan_epochs(
        lengths,
        args.batch_size,
        num_epochs=args.num_epochs,
        max_steps=args.max_steps,
        seed=args.seed,
    )
    num_steps = sum(map(len, plan))
    schedule = build_schedule(
        policy.parameters(),
        learning_rate=args.learning_rate,
        num_steps=num_steps,
        warmup_ratio=0.0,
    )
    say(folder.start())
    save_tensors(cache, ref_logprobs, made_from)
    metrics = Metrics(
        folder.path,
        num_steps=num_steps,
        log_step=args.log_step,
        report=start_trackers(args.report_to, folder=folder.path, arguments=vars(args)),
        console=["loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "lr"],
    )
    with Progress(
        folder,
        plan,
        modules={"policy": policy},
        schedules=[schedule],
        metrics=metrics,
        room=room,
        save_every=args.save_every,
        seed=args.seed,
    ) as progress:
        judge = partial(evaluate, args, policy, pad_id, runtime, heldout, ref_logprobs["eval"])
        add = partial(add_gradient, args, policy, pad_id, runtime)
        if not metrics.rows:
            metrics.add_epoch(0, progress.fitting(judge))
        for epoch, batches in progress.left():
            for rows, done in batches:
                batch = [pairs[row] for row in rows]
                means = progress.fitting(partial(add, batch, ref_logprobs["train"][rows]))
                if metrics.step == 0:
                    check_first_loss(float(means["loss"]), args.beta, runtime)
                learning_rate = schedule.get_last_lr()[0]
                with progress.whole():
                    grad_norm = optimizer_step(
                        [schedule],
                        means["loss"],
                        max_gradient_norm=args.max_gradient_norm,
                        where=f"step {metrics.step + 1}, rows {rows}",
                    )
                    metrics.add(
                        {**means, "grad_norm": grad_norm, "lr": learning_rate},
                        epoch=done,
                        num_tokens=sum(sample_length(sample) for pair in batch for sample in pair),
                    )
            results = progress.fitting(judge)
            with progress.whole():
                folder.save_epoch(
                    policy,
                    tokenizer,
                    epoch=epoch,
                    figure=f"loss={results['eval_loss']:.4f}",
                    objective=results["eval_loss"],
                    facts={"metrics": results},
                )
                metrics.add_epoch(epoch, results)
    metrics.finish(
        [
            ["loss", "eval_loss"],
            ["rewards/accuracies", "eval_rewards/accuracies"],
            ["rewards/chosen", "rewards/rejected", "rewards/margins"],
            ["logps/chosen", "logps/rejected"],
        ],
        best=folder.path / "best",
        next_step="README.md, 'Using the checkpoints': five lines that answer",
    )
    folder.finish()


def add_gradient(
    args: argparse.Namespace,
    policy: PreTrainedModel,
    pad_id: int,
    runtime: Runtime,
    pairs: list[Pair],
    ref_logprobs: Tensor,  # (B, 2)
    room: Room,
) -> dict[str, Tensor]:
    """Add the gradient of an optimisation batch to the weights'; returns means over its pairs."""
    means = {name: torch.zeros((), device=runtime.device) for name in TERMS}
    own = list(share_of(range(len(pairs))))
    lengths = [max(map(sample_length, pairs[row])) for row in own]
    parts = micro_batches(lengths, room, sequences_per_row=2)
    for rows, weight in in_step(policy, own, parts, spare=0):
        some = [pairs[row] for row in rows]
        logprobs = run_whole(policy, pair_logprobs, some, pad_id, runtime)  # (B, 2)
        terms = preference_terms(logprobs, ref_logprobs[rows], args.beta)
        (weight * terms["loss"].sum() / len(pairs)).backward()
        for name, values in terms.items():
            means[name] = means[name] + weight * values.detach().sum() / len(pairs)
    return {name: sum_over_processes(mean) for name, mean in means.items()}


def pair_logprobs(
    model: PreTrainedModel, pairs: list[Pair], pad_id: int, runtime: Runtime
) -> Tensor:  # (B, 2)
    """Log-probabilities of chosen and rejected responses, in one forward."""
    samples = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    batch = build_batch(samples, pad_id).to(runtime.device)
    with runtime.autocast():
        states = response_states(model, batch)  # (2B, R, D)
    head = head_of(model)
    logprobs = token_logprobs(
        states, batch.response_ids, batch.response_mask, head, temperature=1.0
    )  # (2B, R)
    return sequence_logprobs(logprobs, batch.response_mask).view(2, -1).T


@torch.no_grad()
def all_logprobs(
    model: PreTrainedModel, pad_id: int, runtime: Runtime, pairs: list[Pair], room: Room
) -> Tensor:  # (number of pairs, 2)
    """Log-probabilities of all responses, in the order of the pairs."""
    lengths = [max(map(sample_length, pair)) for pair in pairs]
    order = share_of(sorted(range(len(pairs)), key=lengths.__getitem__))
    logprobs = torch.zeros(len(pairs), 2, device=runtime.device)
    ordered = [lengths[row] for row in order]
    parts = micro_batches(ordered, room, sequences_per_row=2)
    for rows, weight in in_step(model, order, parts, spare=0):
        some = [pairs[row] for row in rows]
        logprobs[rows] += weight * run_whole(model, pair_logprobs, some, pad_id, runtime)
    return sum_over_processes(logprobs)


def preference_terms(
    logprobs: Tensor,  # (B, 2)  chosen, rejected
    ref_logprobs: Tensor,  # (B, 2)
    beta: float,
) -> dict[str, Tensor]:  # (B,) each
    """The loss of each pair, and what it is made of."""
    chosen, rejected = logprobs.unbind(dim=1)
    ref_chosen, ref_rejected = ref_logprobs.unbind(dim=1)
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    rewards = beta * (logprobs - ref_logprobs).detach()  # (B, 2)
    return {
        "loss": losses,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def check_first_loss(loss: float, beta: float, runtime: Runtime) -> None:
    """Stop unless policy and reference agree before the first update: then the loss is ln 2."""
    # Rounding moves a sum of bfloat16 logprobs by some hundredths, which beta carries to the loss.
    rounding = 1 + 5 * beta if runtime.precision == "bfloat16" else 1
    if not abs(loss - math.log(2)) <= runtime.tolerance * rounding:
        raise RunError(
            f"the first loss is {loss:.5f}, not ln 2 = {math.log(2):.5f}: policy and reference"
            " differ before any training"
        )


def reference_fingerprint(
    policy: PreTrainedModel, train: list[Pair], heldout: list[Pair], runtime: Runtime
) -> str:
    """Name what the reference's logprobs depend on: its weights, every id, the precision."""
    digest = hashlib.sha256(f"{weights_fingerprint(policy)} {runtime.precision}".encode())
    for pairs in (train, heldout):
        for pair in pairs:
            for ids in chain.from_iterable(pair):
                digest.update(len(ids).to_bytes(8, "big"))
                digest.update(array("q", ids))
        digest.update(b"next side")
    return digest.hexdigest()


@torch.no_grad()
def evaluate(
    args: argparse.Namespace,
    policy: PreTrainedModel,
    pad_id: int,
    runtime: Runtime,
    heldout: list[Pair],
    ref_logprobs: Tensor,
    room: Room,
) -> dict[str, float]:
    """Means over held-out pairs of what is logged in training."""
    logprobs = all_logprobs(policy, pad_id, runtime, heldout, room)
    terms = preference_terms(logprobs, ref_logprobs, args.beta)
    return {f"eval_{name}": float(values.mean()) for name, values in terms.items()}


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
