"""PPO: make the SFT model write what the reward model scores highly, without straying far from it.

    maximise  E[score(prompt, response)] - beta * KL(policy || SFT model)

Each step samples responses to a batch of prompts, scores them, and improves the policy by clipped
updates on them, with a critic as baseline. Reads `.data/pref` (its prompts), writes a checkpoint
for every pass over the prompts into `.model/ppo`. In a healthy log `objective/scores` rises, while
`objective/kl` grows slowly and levels off; `policy/clipfrac_avg` stays below about 0.2, and
`val/ratio` near 1. A score that rises with a KL of tens of nats is a reward model being fooled.
"""

import argparse
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.advantages import gae, token_rewards
from rlhf.arguments import (
    Parser,
    add_boolean,
    add_training_arguments,
    count,
    inner_ratio,
    non_negative,
    nonempty,
    number,
    positive,
    positive_count,
    ratio,
    seed,
)
from rlhf.batches import Batch, PlannedBatch, micro_batches_by_length, plan_epochs
from rlhf.checkpoints import RunFolder, read_run
from rlhf.errors import run_script
from rlhf.experience import (
    Actors,
    Numbers,
    Prompts,
    check_ratio_is_one,
    explained_variance,
    policy_forward,
    roll_out,
    rollout_metrics,
    token_numbers,
)
from rlhf.generation import Rollout, decoder_name
from rlhf.losses import ppo_policy_loss, value_loss
from rlhf.masked import masked_mean, masked_sum, masked_whiten
from rlhf.metrics import Metrics, say, show_samples
from rlhf.models import (
    LANGUAGE_MODEL,
    REWARD_MODEL,
    Critic,
    load_policy,
    load_reward_model,
    load_tokenizer,
    prepare_training,
    require_same_tokenizer,
    set_generation_defaults,
)
from rlhf.optim import build_schedule, optimizer_step
from rlhf.records import PROMPT, fingerprint, prompt_text, read_split
from rlhf.rewards import (
    RewardFacts,
    Scorer,
    read_reward_facts,
    score_by_function,
    score_by_model,
)
from rlhf.runtime import Runtime, start_runtime, start_trackers
from rlhf.sampling import Sampling
from rlhf.tokens import count_dropped, early_end_ids, encode_prompts, has_room

CONSOLE = [
    "objective/scores",
    "objective/kl",
    "objective/rlhf_reward",
    "response_length",
    "eos_rate",
    "policy/clipfrac_avg",
    "loss/value_avg",
]
EVAL_BATCH = 64  # prompts that are judged together: memory only


def build_parser() -> Parser:
    parser = Parser("PPO on the prompts of .data/pref, against a reward model or function.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of order and sampling")
    add("--sft_model_path", type=nonempty, required=True, help="SFT checkpoint, also the reference")
    add("--rm_model_path", type=nonempty, help="reward model; needed without --reward_fn")
    add("--ckpt_dir", type=nonempty, default=".model/ppo", help="folder for checkpoints")
    add("--gpu_id", type=count, default=0, help="which CUDA device")
    add("--max_reward", type=number(float, above=1), default=5.0, help="the reward model's own")
    add("--data_dir", type=nonempty, default=".data/pref", help="holds train.jsonl and eval.jsonl")
    add("--max_len", type=positive_count, default=1024, help="tokens of prompt and response")
    add("--min_gen_len", type=count, default=1, help="tokens before a response may end")
    names = ("--do_sampling", "--do_sample")
    add_boolean(parser, *names, default=True, help="sample (false: decode greedily)")
    add("--temperature", type=positive, default=0.2, help="divides the logits")
    add("--top_k", type=count, default=50, help="sample from the likeliest so many (0 = all)")
    add("--top_p", type=number(float, above=0, most=1), default=1.0, help="share of mass kept")
    names = ("--num_outer_epoch", "--num_outer_epochs")
    add(*names, type=positive_count, default=1, help="passes over the prompts")
    names = ("--num_inner_epoch", "--num_inner_epochs")
    add(*names, type=positive_count, default=3, help="passes over each rollout")
    add("--batch_size", type=positive_count, default=16, help="prompts in a rollout")
    add("--learning_rate", type=positive, default=1e-5, help="learning rate at the start")
    add("--beta", type=non_negative, default=0.2, help="weight of the KL penalty")
    add("--max_kl_div", type=positive, default=10.0, help="guard on the KL of a token, both signs")
    add("--gae_lambda", type=ratio, default=0.9, help="lambda of the advantage estimate")
    add("--gamma", type=ratio, default=1.0, help="discount of later rewards")
    add("--epsilon", type=inner_ratio, default=0.2, help="clip range of the probability ratio")
    add("--value_loss_coeff", type=non_negative, default=0.1, help="weight of the value loss")
    add("--minibatch_size", type=count, default=0, help="sequences in a step (0 = the rollout)")
    add("--max_new_tokens", type=count, default=0, help="cap on a response (0 = up to max_len)")
    add("--missing_eos_penalty", type=non_negative, default=1.0, help="taken off without EOS")
    add("--value_clip", type=non_negative, default=0.0, help="clip range of values (0 = off)")
    add("--critic", choices=("separate", "shared"), default="separate", help="own trunk or not")
    add("--reward_fn", type=nonempty, help="file.py:function or module:function")
    add("--eval_samples", type=count, default=256, help="held-out prompts to judge by (0 = all)")
    add_training_arguments(parser, log_step=1, unit="rollouts")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.rm_model_path and not args.reward_fn:
        parser.error("one of --rm_model_path and --reward_fn is required")
    if 0 < args.max_new_tokens < args.min_gen_len:
        limits = f"--max_new_tokens={args.max_new_tokens} is less than --min_gen_len"
        parser.error(f"{limits}={args.min_gen_len}: no response could end")
    return args


def load_prompts(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, side: str, max_samples: int
) -> Prompts:
    records = read_split(args.data_dir, side, PROMPT, max_samples)
    prompts = [record["prompt"] for record in records]
    fitting = [
        (ids, prompt_text(prompt))
        for ids, prompt in zip(
            encode_prompts(tokenizer, prompts, args.data_dir), prompts, strict=True
        )
        if has_room(ids, max_len=args.max_len, min_len=args.min_gen_len)
    ]
    room = {"max_len": args.max_len, "min_len": args.min_gen_len}
    say(count_dropped(len(fitting), len(records), side=side, **room))
    return Prompts([ids for ids, _ in fitting], [text for _, text in fitting])


def check_reward_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> RewardFacts:
    """Check that the reward model fits, before any weights are read."""
    flag, path = "--rm_model_path", args.rm_model_path
    own = load_tokenizer(path, flag=flag, kind=REWARD_MODEL, max_len=args.max_len)
    require_same_tokenizer(tokenizer, own, flag=flag)
    return read_reward_facts(read_run(path, flag=flag), path=path, max_reward=args.max_reward)


def load_reward(args: argparse.Namespace, device: torch.device, eos_id: int) -> PreTrainedModel:
    path = args.rm_model_path
    return load_reward_model(path, flag="--rm_model_path", device=device, eos_id=eos_id)


def load_actors(
    args: argparse.Namespace, sampling: Sampling, runtime: Runtime, mean_reward: float
) -> Actors:
    """Load policy and reference, and a critic: on the reward model's trunk if there is one.

    Every dropout is at 0: PPO compares numbers of forwards that must be the same function.
    """
    load = partial(load_policy, args.sft_model_path, flag="--sft_model_path", device=runtime.device)
    prepare = partial(
        prepare_training,
        gradient_checkpointing=args.gradient_checkpointing,
        compile=args.compile,
    )
    policy, ref_policy = prepare(load()), load().requires_grad_(False)
    if args.critic == "shared":
        trunk, hidden_size = None, policy.config.hidden_size
    else:
        model = load() if args.reward_fn else load_reward(args, runtime.device, sampling.eos_id)
        trunk, hidden_size = prepare(model).base_model, model.config.hidden_size
    critic = Critic(trunk, hidden_size, mean_reward).to(runtime.device).train()
    return Actors(policy, ref_policy, critic, sampling, args.micro_batch_size, runtime)


def main(args: argparse.Namespace) -> None:
    runtime = start_runtime(args.gpu_id, dtype=args.dtype, seed=args.seed, report_to=args.report_to)
    say(runtime.notice)
    flag, sft_path = "--sft_model_path", args.sft_model_path
    inputs = {flag: sft_path, "--data_dir": args.data_dir}
    if not args.reward_fn:
        inputs["--rm_model_path"] = args.rm_model_path
    folder = RunFolder(
        args.ckpt_dir,
        stage="ppo",
        inputs=inputs,
        arguments=vars(args),
        data=fingerprint(args.data_dir),
        resume=args.resume,
    )
    tokenizer = load_tokenizer(sft_path, flag=flag, kind=LANGUAGE_MODEL, max_len=args.max_len)
    if args.reward_fn:
        score = score_by_function(args.reward_fn)
    else:
        reward_facts = check_reward_model(args, tokenizer)
    train = load_prompts(args, tokenizer, "train", args.max_samples)
    heldout = load_prompts(args, tokenizer, "eval", args.eval_samples)
    eos_id, mean_reward = tokenizer.eos_token_id, 0.0
    if not args.reward_fn:
        reward_model = load_reward(args, runtime.device, eos_id)
        size, mean_reward = args.micro_batch_size, reward_facts.reward_mean
        score = score_by_model(reward_model, reward_facts, runtime=runtime, micro_batch_size=size)
    sampling = Sampling(
        do_sampling=args.do_sampling,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_gen_len=args.min_gen_len,
        max_new_tokens=args.max_new_tokens,
        max_len=args.max_len,
        eos_id=eos_id,
        early_end_ids=early_end_ids(tokenizer),
    )
    actors = load_actors(args, sampling, runtime, mean_reward)
    policy, critic = actors.policy, actors.critic
    set_generation_defaults(policy, tokenizer, **sampling.generation_config())

    plan = plan_epochs(
        [len(ids) for ids in train.ids],
        args.batch_size,
        num_epochs=args.num_outer_epoch,
        max_steps=args.max_steps,
        seed=args.seed,
    )
    # Whatever may fail does so here, before an earlier run is moved away.
    untrained = evaluate(args, actors, tokenizer, score, heldout)
    say(decoder_name(policy))
    say(warn_of_little_exploration(args))
    say(folder.start())
    metrics = Metrics(
        folder.path,
        num_steps=sum(map(len, plan)),
        log_step=args.log_step,
        report=start_trackers(args.report_to, folder=folder.path, arguments=vars(args)),
        console=CONSOLE,
    )
    metrics.add_epoch(0, untrained)
    if args.reward_fn:
        torch.nn.init.constant_(critic.head.bias, untrained["eval_scores"])
    schedules = build_schedules(args, policy, critic, plan)

    for epoch, batches in enumerate(plan, start=1):
        for rows, progress in batches:
            # 1 rollout: write a response to each prompt
            noise_key = (args.seed, metrics.step + 1)
            rollout, responses = roll_out(actors, tokenizer, train, rows, noise_key=noise_key)
            mask = rollout.batch.response_mask  # (B, R)
            # 2 score: judge whole responses; one that did not end by itself pays for it
            texts = [train.texts[row] for row in rows]
            scores = score_responses(args, score, texts, responses, rollout)  # (B,)
            # 3 reward: the score on the last token, the KL penalty on every token
            numbers = token_numbers(actors, rollout)  # (B, R) each
            if metrics.step == 0:
                check_ratio_is_one(actors, rollout, numbers)
            rewards = token_rewards(
                scores, numbers.kl, mask, beta=args.beta, max_kl_div=args.max_kl_div
            )  # (B, R)
            # 4 advantage: how much better than the critic expected, in units of its spread
            advantages, returns = gae(
                rewards, numbers.values, mask, gamma=args.gamma, gae_lambda=args.gae_lambda
            )  # (B, R) each
            advantages = masked_whiten(advantages, mask)
            # 5 update: several passes of clipped gradient steps over the rollout
            learning_rate = schedules[0].get_last_lr()[0]
            updates = update(
                args,
                actors,
                schedules,
                rollout,
                numbers,
                advantages,
                returns,
                step=metrics.step + 1,
                names=rows,
            )
            # 6 report
            report = {
                **rollout_metrics(scores, rewards, numbers, mask, rollout.ended),
                **updates,
                "guarded_kl": masked_mean((numbers.kl.abs() > args.max_kl_div).float(), mask),
                "explained_variance": explained_variance(numbers.values, returns, mask),
                "lr": learning_rate,
            }
            num_tokens = sum(len(train.ids[row]) for row in rows) + int(mask.sum())
            if metrics.add(report, epoch=progress, num_tokens=num_tokens):
                kl = numbers.kl.sum(dim=1)  # (B,) nats
                show_samples(texts, responses, scores.tolist(), kl.tolist())
        results = evaluate(args, actors, tokenizer, score, heldout)
        folder.save_epoch(
            policy,
            tokenizer,
            epoch=epoch,
            figure=f"reward={results['eval_scores']:.2f}",
            objective=-results["eval_objective"],
            facts={"metrics": results},
        )
        metrics.add_epoch(epoch, results)
    metrics.finish(
        [
            ["objective/scores", "eval_scores"],
            ["objective/kl", "eval_kl"],
            ["policy/entropy_avg"],
            ["policy/clipfrac_avg", "policy/approxkl_avg"],
            ["response_length"],
            ["loss/value_avg", "explained_variance"],
        ],
        best=folder.path / "best",
        next_step="README.md, 'Using the checkpoints': five lines that answer",
    )


def score_responses(
    args: argparse.Namespace,
    score: Scorer,
    prompts: list[str],
    responses: list[str],
    rollout: Rollout,
) -> Tensor:  # (B,)
    """Score responses; one that was cut off stays as it is and pays `missing_eos_penalty`."""
    scores = score(prompts, responses, rollout.batch, rollout.ended)
    return scores - args.missing_eos_penalty * (~rollout.ended).float()


def build_schedules(
    args: argparse.Namespace,
    policy: PreTrainedModel,
    critic: Critic,
    plan: list[list[PlannedBatch]],
) -> list[LambdaLR]:
    """Build an optimiser each for policy and critic, or one for both where they share a trunk."""
    sizes = [len(batch.rows) for batches in plan for batch in batches]
    minibatches = sum(math.ceil(size / (args.minibatch_size or size)) for size in sizes)
    groups = [[*policy.parameters()], [*critic.parameters()]]
    if args.critic == "shared":
        groups = [groups[0] + groups[1]]
    return [
        build_schedule(
            group,
            learning_rate=args.learning_rate,
            num_steps=args.num_inner_epoch * minibatches,
            warmup_ratio=0.0,
        )
        for group in groups
    ]


def token_terms(
    args: argparse.Namespace,
    actors: Actors,
    rollout: Rollout,
    rows: Tensor,
    batch: Batch,
    old: Numbers,
    advantages: Tensor,
    returns: Tensor,
) -> dict[str, Tensor]:  # (B, R) each
    """Losses and diagnostics of a micro-batch, which holds these rows of the rollout."""
    here = (rows, slice(batch.response_ids.shape[1]))
    logprobs, values = policy_forward(actors, rollout, rows, batch)
    policy_losses = ppo_policy_loss(
        logprobs, old.logprobs[here], advantages[here], epsilon=args.epsilon
    )
    value_losses = value_loss(values, old.values[here], returns[here], value_clip=args.value_clip)
    with torch.no_grad():
        log_ratio = logprobs - old.logprobs[here]
        ratio = log_ratio.exp()
    return {
        "loss/policy_avg": policy_losses,
        "loss/value_avg": value_losses,
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        "policy/clipfrac_avg": (policy_losses > -ratio * advantages[here]).float(),
        "val/ratio": ratio,
        "val/clipfrac_avg": (value_losses > 0.5 * (values - returns[here]).square()).float(),
    }


def update(
    args: argparse.Namespace,
    actors: Actors,
    schedules: list[LambdaLR],
    rollout: Rollout,
    old: Numbers,
    advantages: Tensor,  # (B, R)
    returns: Tensor,  # (B, R)
    *,
    step: int,
    names: Sequence[int],  # (B,)  what the prompts are called if something goes wrong
) -> dict[str, Tensor]:
    """Take the optimiser steps of one rollout; returns the means of what was seen on the way.

    A mean runs over the tokens of a minibatch: how it is cut into micro-batches changes nothing.
    """
    mask = rollout.batch.response_mask
    num_rows, totals, num_steps = len(mask), defaultdict(list), 0
    actors.policy.train()  # without dropout, this does nothing but allow gradient checkpointing
    for inner_epoch in range(args.num_inner_epoch):
        rng = random.Random(f"{args.seed}/{step}/{inner_epoch}")
        shuffled = rng.sample(range(num_rows), num_rows)
        for start in range(0, num_rows, args.minibatch_size or num_rows):
            minibatch = shuffled[start : start + (args.minibatch_size or num_rows)]
            num_tokens = mask[minibatch].sum()
            loss = torch.zeros((), device=mask.device)
            parts = micro_batches_by_length(rollout.batch, minibatch, args.micro_batch_size)
            for rows, batch in parts:
                terms = token_terms(args, actors, rollout, rows, batch, old, advantages, returns)
                means = {
                    name: masked_sum(x, batch.response_mask) / num_tokens
                    for name, x in terms.items()
                }
                value_part = args.value_loss_coeff * means["loss/value_avg"]
                part_loss = means["loss/policy_avg"] + value_part
                part_loss.backward()
                loss += part_loss.detach()
                for name, mean in means.items():
                    totals[name].append(mean.detach())
            grad_norm = optimizer_step(
                schedules,
                loss,
                max_gradient_norm=args.max_gradient_norm,
                where=f"rollout {step}, prompts {[names[i] for i in minibatch]}",
            )
            totals["grad_norm"].append(grad_norm)
            num_steps += 1
    actors.policy.eval()
    return {name: torch.stack(parts).sum() / num_steps for name, parts in totals.items()}


@torch.no_grad()
def evaluate(
    args: argparse.Namespace,
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    score: Scorer,
    heldout: Prompts,
) -> dict[str, float]:
    """Judge the policy on fixed prompts with fixed noise: score, KL, and their balance."""
    actors = actors._replace(critic=None)
    columns: list[Tensor] = []
    for start in range(0, len(heldout.ids), EVAL_BATCH):
        rows = range(len(heldout.ids))[start : start + EVAL_BATCH]
        noise_key = (args.seed, 0)  # no training step has this one
        rollout, responses = roll_out(actors, tokenizer, heldout, rows, noise_key=noise_key)
        texts = [heldout.texts[row] for row in rows]
        scores = score_responses(args, score, texts, responses, rollout)
        kl = token_numbers(actors, rollout).kl.sum(dim=1)
        lengths = rollout.batch.response_mask.sum(dim=1)
        columns.append(torch.stack((scores, kl, lengths, rollout.ended)))
    scores, kl, lengths, ended = torch.cat(columns, dim=1)  # (B,) each
    return {
        "eval_scores": float(scores.mean()),
        "eval_kl": float(kl.mean()),
        "eval_objective": float((scores - args.beta * kl).mean()),
        "eval_length": float(lengths.mean()),
        "eval_eos_rate": float(ended.mean()),
    }


def warn_of_little_exploration(args: argparse.Namespace) -> str:
    """Say what sampling settings do to PPO, where they do much."""
    if not args.do_sampling:
        return "note: --do_sampling=false: greedy responses explore nothing; PPO can learn little"
    if args.top_p < 1 and args.top_k == 0:
        return "note: --top_p without --top_k may keep thousands of ids of every token in memory"
    if args.temperature < 0.5:
        return (
            f"note: --temperature={args.temperature:g} explores little: the policy can hardly"
            " find better responses than those it prefers already; 1.0 finds more"
        )
    return ""


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
