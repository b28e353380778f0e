"""DPO and its relatives: learn from better and worse responses, without a reward model.

    loss = -log sigmoid(beta * ((log pi(chosen) - log ref(chosen))
                                - (log pi(rejected) - log ref(rejected))))

`--loss` chooses among `dpo` (above), `ipo`, `hinge`, `simpo` and `rrhf`: one function of
`rlhf/losses.py` each, one branch of `preference_losses`. The reference is the SFT model that
training starts from; its logprobs are computed once, and not at all for `simpo` and `rrhf`, which
have none. `rewards/*` are the loss's own implicit rewards. Reads `.data/pref` (`rrhf`: `.data/rm`,
all responses to a prompt), writes a checkpoint for every epoch into `.model/dpo`. In a healthy log
the loss starts at ln 2 = 0.693 (`ipo`: 1 / (4 beta^2), `hinge`: 1) and falls, `rewards/accuracies`
and `rewards/margins` rise. Watch `logps/chosen` too: if it sinks far below its start, the policy
forgets good responses along with bad ones, and a larger beta, `--sft_coeff` or a lower learning
rate is due.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.arguments import (
    COMPILING,
    Parser,
    add_lora_arguments,
    add_training_arguments,
    auto_or,
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
)
from rlhf.batches import Room, micro_batches, plan_epochs, sample_length
from rlhf.checkpoints import save_tensors
from rlhf.comparisons import (
    Comparison,
    all_logprobs,
    kept_logprobs,
    most_responses,
    reference_fingerprint,
    response_logprobs,
)
from rlhf.curves import Panel
from rlhf.earlier import RESUME
from rlhf.errors import InputError, RunError, run_script
from rlhf.lora import active, add_adapter, trained_share
from rlhf.losses import cdpo_loss, dpo_loss, hinge_loss, ipo_loss, rrhf_loss, simpo_loss
from rlhf.memory import fit
from rlhf.metrics import Metrics, say
from rlhf.models import (
    LANGUAGE_MODEL,
    load_policy,
    load_tokenizer,
    prepare_training,
    set_generation_defaults,
)
from rlhf.optim import build_schedule, optimizer_step
from rlhf.processes import main_first, share_of, sum_over_processes
from rlhf.rankings import list_pairs, rank_responses
from rlhf.records import PAIR, SCORED, changed_since_written, fingerprint, read_split
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
from rlhf.tokens import count_dropped, encode_samples
from rlhf.trackers import start_trackers

BETA = {"dpo": 0.2, "ipo": 0.5, "hinge": 0.2, "simpo": 2.0}  # what --beta=auto means
OF_MEANS = ("ipo", "simpo", "rrhf")  # look at the mean logprob of a response's tokens, not the sum
REFERENCE_FREE = ("simpo", "rrhf")
TERMS = (  # of each comparison, under TRL's names
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
EACH = [(side, which) for which in ("chosen", "rejected") for side in ("", "eval_")]
PANELS = [
    Panel("loss", ["loss", "eval_loss"]),
    Panel("share of pairs won (a tie is not)", ["rewards/accuracies", "eval_rewards/accuracies"]),
    Panel("margin of the implicit rewards", ["rewards/margins", "eval_rewards/margins"]),
    Panel("implicit rewards", [f"{x}rewards/{y}" for x, y in EACH]),
    Panel("log-probability of a response", [f"{x}logps/{y}" for x, y in EACH]),
    Panel("gradient norm", ["grad_norm"]),
    Panel("cross-entropy of the chosen", ["nll_loss", "eval_nll_loss"]),
]


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
    add("--batch_size", type=positive_count, default=16, help="pairs (rrhf: prompts) in a step")
    add("--learning_rate", type=positive, default=1e-5, help="learning rate at the start")
    losses = (*BETA, "rrhf")
    add("--loss", choices=losses, default="dpo", help="preference loss; rrhf wants .data/rm")
    help = "how strongly the reference holds (auto: dpo, hinge 0.2, ipo 0.5, simpo 2)"
    add("--beta", type=auto_or(positive), default="auto", help=help)
    help = "share of the pairs that are taken to be the wrong way round (dpo)"
    add("--label_smoothing", type=number(float, least=0, below=0.5), default=0.0, help=help)
    add("--simpo_gamma", type=non_negative, default=1.0, help="margin that simpo asks for")
    help = "weight of the chosen response's mean cross-entropy (auto: rrhf 1, else 0)"
    add("--sft_coeff", type=auto_or(non_negative), default="auto", help=help)
    names = ["--log_step", "--logging_steps"]
    add_training_arguments(parser, log_step=100, log_step_names=names)
    add_lora_arguments(parser, dropout=0.0)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for loss, name in (("dpo", "label_smoothing"), ("simpo", "simpo_gamma")):
        value = getattr(args, name)
        if args.loss != loss and value != parser.get_default(name):
            parser.error(f"--{name}={value:g} is for --loss={loss}, not {args.loss}: leave it out")
    if args.loss == "rrhf" and args.beta != "auto":
        parser.error(f"--beta={args.beta:g}: --loss=rrhf has no beta: leave it out")
    if args.beta == "auto":
        args.beta = BETA.get(args.loss)
    if args.sft_coeff == "auto":
        args.sft_coeff = 1.0 if args.loss == "rrhf" else 0.0
    return check_lora_arguments(parser, args)


def load_comparisons(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, side: str, max_samples: int
) -> list[Comparison]:
    """Read what is compared: pairs, or all scored responses to each prompt.

    A pair goes if either response has no room. In `rrhf` a response drops only itself.
    """
    sizes = {"max_len": args.max_len, "min_len": args.min_gen_len}
    encode = partial(encode_samples, tokenizer, **sizes, data_dir=args.data_dir)
    if args.loss != "rrhf":
        pairs = read_split(args.data_dir, side, PAIR, max_samples)
        prompts = [record["prompt"] for record in pairs]
        chosen = encode(prompts, [record["chosen"] for record in pairs])
        rejected = encode(prompts, [record["rejected"] for record in pairs])
        kept = [[a, b] for a, b in zip(chosen, rejected, strict=True) if a and b]
        say(count_dropped(len(kept), len(pairs), side=side, **sizes))
        return [Comparison(samples, [(0, 1)]) for samples in kept]
    records = read_split(args.data_dir, side, SCORED, max_samples)
    prompts = [record["prompt"] for record in records]
    encoded = encode(prompts, [record["response"] for record in records])
    scored = [(sample, record) for sample, record in zip(encoded, records, strict=True) if sample]
    say(count_dropped(len(scored), len(records), side=side, **sizes))
    scored.sort(key=lambda item: -item[1]["score"])  # so that the best of a prompt comes first
    rankings = rank_responses(
        [record["prompt_id"] for _, record in scored], [record["score"] for _, record in scored]
    )
    if not rankings:
        raise InputError(
            f"--data_dir={args.data_dir}: no prompt in {side}.jsonl has responses with different"
            " scores, which --loss=rrhf compares; give more rows, as in --data_dir=.data/rm"
        )
    return [Comparison([scored[row][0] for row in rows], pairs) for rows, pairs in rankings]


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
        defaults=vars(parse_args(["--sft_model_path=x"])),
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
        comparisons = load_comparisons(args, tokenizer, "train", args.max_samples)
        heldout = load_comparisons(args, tokenizer, "eval", 0)

    # Every dropout is at 0: policy and reference are the same function until the first update, and
    # so the policy can compute the reference's logprobs before it is trained.
    policy = load_policy(sft_path, flag=flag, device=runtime.device).train()
    sides = {"train": comparisons, "eval": heldout}
    has_reference = args.loss not in REFERENCE_FREE
    if has_reference:
        made_from = {"sha256": reference_fingerprint(policy, sides.values(), runtime.precision)}
    if args.use_peft:
        add_adapter(policy, **lora_options(args))
        say(trained_share(policy))
    prepare_training(
        policy, gradient_checkpointing=args.gradient_checkpointing, compile=args.compile
    )
    say(COMPILING if args.compile else "")
    set_generation_defaults(policy, tokenizer)
    pad_id = tokenizer.pad_token_id
    room, cache = Room(args.micro_batch_size), folder.path / RESUME / "ref_logprobs"
    ref_logprobs = {  # (number of comparisons, K) each
        side: torch.zeros(len(some), most_responses(some)) for side, some in sides.items()
    }
    if has_reference and (kept := kept_logprobs(cache, made_from, runtime.device)):
        ref_logprobs = kept
    elif has_reference:
        for side, some in sides.items():
            compute = partial(all_logprobs, policy, pad_id, runtime, some)
            with active(policy, None):
                ref_logprobs[side], room = fit(compute, room, runtime.device)
    shard(policy, zero_stage=runtime.zero_stage)
    plan = plan_epochs(
        [comparison.length for comparison in comparisons],
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
    if has_reference:
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
        best = [comparison.samples[0] for comparison in heldout]
        sizes = {"max_len": args.max_len, "seed": args.seed}
        write = partial(write_samples, policy, tokenizer, best, runtime, **sizes)
        if not metrics.rows:
            results = progress.fitting(judge)
            metrics.add_epoch(0, results, progress.fitting(write) if metrics.report else [])
        for epoch, batches in progress.left():
            for rows, done in batches:
                batch = [comparisons[row] for row in rows]
                means = progress.fitting(partial(add, batch, ref_logprobs["train"][rows]))
                if metrics.step == 0:
                    check_first_loss(args, means, runtime)
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
                        num_tokens=sum(sample_length(s) for x in batch for s in x.samples),
                    )
            results = progress.fitting(judge)
            shown = progress.fitting(write) if metrics.report else []
            with progress.whole():
                folder.save_epoch(
                    policy,
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
            "exec_run_eval.sh",
            model_path=(f"DPO={folder.path}/best", "DPO=.model/dpo/best"),
        ),
    )
    folder.finish()


def add_gradient(
    args: argparse.Namespace,
    policy: PreTrainedModel,
    pad_id: int,
    runtime: Runtime,
    comparisons: list[Comparison],
    ref_logprobs: Tensor,  # (B, K)
    room: Room,
) -> dict[str, Tensor]:
    """Add the gradient of an optimisation batch to the weights'; returns means over it."""
    names = (*TERMS, "nll_loss") if args.sft_coeff else TERMS
    means = {name: torch.zeros((), device=runtime.device) for name in names}
    own = list(share_of(range(len(comparisons))))
    lengths = [comparisons[row].length for row in own]
    parts = micro_batches(lengths, room, sequences_per_row=most_responses(comparisons))
    for rows, weight in in_step(policy, own, parts, spare=0):
        some = [comparisons[row] for row in rows]
        logprobs = run_whole(policy, response_logprobs, some, pad_id, runtime)  # (B, K)
        terms = preference_terms(args, some, logprobs, ref_logprobs[rows])
        (weight * terms["loss"].sum() / len(comparisons)).backward()
        for name, values in terms.items():
            means[name] = means[name] + weight * values.detach().sum() / len(comparisons)
    return {name: sum_over_processes(mean) for name, mean in means.items()}


def preference_terms(
    args: argparse.Namespace,
    comparisons: list[Comparison],
    logprobs: Tensor,  # (B, K)
    ref_logprobs: Tensor,  # (B, K)  0 if the loss has no reference
) -> dict[str, Tensor]:  # (B,) each
    """The loss of each comparison, and what it is made of; of several pairs, the mean."""
    device = logprobs.device
    pairs = list_pairs(comparison.pairs for comparison in comparisons)
    rows, better, worse = torch.tensor(pairs, device=device).T  # (N,) each
    counts = [torch.tensor([len(s.response_ids) for s in x.samples]) for x in comparisons]
    lengths = pad_sequence(counts, batch_first=True, padding_value=1).to(device)  # (B, K)
    per_token = logprobs / lengths
    values, ref_values = logprobs, ref_logprobs.to(device)[:, : logprobs.shape[1]]
    if args.loss in OF_MEANS:
        values, ref_values = per_token, ref_values / lengths
    rewards = (args.beta or 1.0) * (values - ref_values).detach()  # (B, K)

    def summed(of_pairs: Tensor) -> Tensor:  # (N,) -> (B,)
        return torch.zeros(len(comparisons), device=device).index_add(0, rows, of_pairs)

    num_pairs = summed(torch.ones(len(rows), device=device))
    chosen, rejected = (rows, better), (rows, worse)
    losses = preference_losses(
        args, values[chosen], values[rejected], ref_values[chosen], ref_values[rejected]
    )  # (N,)
    terms = {
        "loss": summed(losses),
        "rewards/chosen": summed(rewards[chosen]) / num_pairs,
        "rewards/rejected": summed(rewards[rejected]) / num_pairs,
        "rewards/margins": summed(rewards[chosen] - rewards[rejected]) / num_pairs,
        "rewards/accuracies": summed((rewards[chosen] > rewards[rejected]).float()) / num_pairs,
        "logps/chosen": summed(logprobs[chosen]) / num_pairs,
        "logps/rejected": summed(logprobs[rejected]) / num_pairs,
    }
    if args.sft_coeff:
        terms["nll_loss"] = -per_token[:, 0]  # the best response comes first
        terms["loss"] = terms["loss"] + args.sft_coeff * terms["nll_loss"]
    return terms


def preference_losses(
    args: argparse.Namespace,
    chosen: Tensor,  # (N,)  logprobs of N pairs: sums, or means over tokens for OF_MEANS
    rejected: Tensor,  # (N,)
    ref_chosen: Tensor,  # (N,)
    ref_rejected: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """The loss that was asked for."""
    four = chosen, rejected, ref_chosen, ref_rejected
    match args.loss:
        case "dpo" if args.label_smoothing:
            return cdpo_loss(*four, beta=args.beta, label_smoothing=args.label_smoothing)
        case "dpo":
            return dpo_loss(*four, beta=args.beta)
        case "ipo":
            return ipo_loss(*four, beta=args.beta)
        case "hinge":
            return hinge_loss(*four, beta=args.beta)
        case "simpo":
            return simpo_loss(chosen, rejected, beta=args.beta, simpo_gamma=args.simpo_gamma)
        case "rrhf":
            return rrhf_loss(chosen, rejected)
        case _:
            raise AssertionError(args.loss)


def check_first_loss(args: argparse.Namespace, means: dict[str, Tensor], runtime: Runtime) -> None:
    """Stop unless policy and reference agree before the first update: then the loss is known."""
    if args.loss in REFERENCE_FREE:
        return
    name, expected, slope = {  # the loss at a margin of 0, and how steep it is there
        "dpo": ("ln 2", math.log(2), args.beta / 2),
        "ipo": ("1 / (4 beta^2)", 1 / (4 * args.beta**2), 1 / args.beta),
        "hinge": ("1", 1.0, args.beta),
    }[args.loss]
    loss = float(means["loss"] - args.sft_coeff * means.get("nll_loss", 0.0))
    # What rounding may do to a margin: of sums over long responses, or of means over tokens.
    of_sums, of_means = (1e-3, 1e-5) if runtime.precision == "float32" else (0.2, 0.02)
    rounding = slope * (of_means if args.loss in OF_MEANS else of_sums)
    if not abs(loss - expected) <= max(runtime.tolerance * max(1.0, expected), rounding):
        raise RunError(
            f"the first loss of --loss={args.loss} is {loss:.5f}, not {name} = {expected:.5f}:"
            " policy and reference differ before any training"
        )


@torch.no_grad()
def evaluate(
    args: argparse.Namespace,
    policy: PreTrainedModel,
    pad_id: int,
    runtime: Runtime,
    heldout: list[Comparison],
    ref_logprobs: Tensor,
    room: Room,
) -> dict[str, float]:
    """Means over held-out comparisons of what is logged in training."""
    logprobs = all_logprobs(policy, pad_id, runtime, heldout, room)
    terms = preference_terms(args, heldout, logprobs, ref_logprobs)
    return {f"eval_{name}": float(values.mean()) for name, values in terms.items()}


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
