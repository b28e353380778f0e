"""PPO: make the SFT model write what the reward model scores highly, without straying far from it.

    maximise  E[score(prompt, response)] - beta * KL(policy || SFT model)

Each step samples responses to a batch of prompts, scores them, and improves the policy by clipped
updates on them. What they are measured against is a critic, or several responses to one prompt are
measured against each other (--advantage). Reads `.data/pref` (its prompts), writes a checkpoint
for every pass over the prompts into `.model/ppo`. In a healthy log `objective/scores` rises, while
`objective/kl` grows slowly and levels off; `policy/clipfrac_avg` stays below about 0.2, and
`val/ratio` near 1. A score that rises with a KL of tens of nats is a reward model being fooled.
"""

import argparse
import copy
import math
import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.actors import Actors, build_sampling, load_models
from rlhf.advantages import adaptive_beta, dr_grpo, gae, grpo, rloo, token_rewards
from rlhf.arguments import (
    COMPILING,
    Parser,
    add_boolean,
    add_lora_arguments,
    add_training_arguments,
    check_lora_arguments,
    command,
    count,
    inner_ratio,
    lora_options,
    non_negative,
    nonempty,
    number,
    positive,
    positive_count,
    ratio,
    seed,
)
from rlhf.batches import Batch, PlannedBatch, Room, micro_batches_by_length, plan_epochs
from rlhf.curves import Panel
from rlhf.errors import InputError, run_script
from rlhf.experience import (
    Experience,
    Penalty,
    check_ratio_is_one,
    decode_responses,
    join_processes,
    policy_forward,
    roll_out,
    rollout_metrics,
    token_numbers,
)
from rlhf.generation import decoder_name
from rlhf.lora import trained_share
from rlhf.losses import ppo_policy_loss, value_loss
from rlhf.masked import masked_sum, masked_whiten
from rlhf.memory import fit
from rlhf.metrics import Metrics, Samples, say, show_samples
from rlhf.models import (
    LANGUAGE_MODEL,
    Critic,
    load_tokenizer,
    set_generation_defaults,
)
from rlhf.optim import build_schedule, optimizer_step, skip_steps
from rlhf.processes import join_rows, main_first, share_of, sum_over_processes
from rlhf.prompts import Prompts, load_prompts
from rlhf.records import changed_since_written, fingerprint
from rlhf.responses import Rollout
from rlhf.resume import Progress
from rlhf.rewards import (
    RewardFacts,
    Scorer,
    ScoreScale,
    file_of,
    score_by_function,
    stored_scale,
)
from rlhf.run_folder import RunFolder
from rlhf.runtime import Runtime, require_equal_shares, start_runtime
from rlhf.samples import judged_samples
from rlhf.scorers import load_judge, read_judge
from rlhf.trackers import start_trackers

CONSOLE = [
    "objective/scores",
    "objective/kl",
    "objective/rlhf_reward",
    "response_length",
    "eos_rate",
    "policy/clipfrac_avg",
]
# Of a response token in an update
POLICY_TERMS = ["loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"]
VALUE_TERMS = ["loss/value_avg", "val/clipfrac_avg"]
UPDATE_METRICS = [*POLICY_TERMS, *VALUE_TERMS, "grad_norm"]
GROUP_ADVANTAGES = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}  # which need no critic
OF_CRITIC = ("critic", "gamma", "gae_lambda", "value_clip", "value_loss_coeff")
EVAL_BATCH = 64  # prompts that are judged together: memory only


def build_parser() -> Parser:
    parser = Parser("PPO on the prompts of .data/pref, against a reward model or function.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of order and sampling")
    add("--sft_model_path", type=nonempty, required=True, help="SFT checkpoint, also the reference")
    add(
        "--rm_model_path",
        type=nonempty,
        help="reward model or text classifier, if there is no --reward_fn",
    )
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
    add("--num_responses", type=positive_count, default=1, help="responses to each of its prompts")
    names = ("gae", *GROUP_ADVANTAGES)
    add("--advantage", choices=names, default="gae", help="gae: by a critic; the others compare")
    add("--learning_rate", type=positive, default=1e-5, help="learning rate at the start")
    add("--beta", type=non_negative, default=0.2, help="weight of the KL penalty")
    names = ("fixed", "adaptive")
    add("--kl_controller", choices=names, default="fixed", help="adaptive: beta follows the KL")
    add("--target_kl", type=positive, default=6.0, help="KL that it steers to, nats a response")
    add("--max_kl_div", type=positive, default=10.0, help="guard on the KL of a token, both signs")
    add("--gae_lambda", type=ratio, default=0.9, help="lambda of the advantage estimate")
    add("--gamma", type=ratio, default=1.0, help="discount of later rewards")
    add("--epsilon", type=inner_ratio, default=0.2, help="clip range of the probability ratio")
    help = "KL from the rollout's policy, nats a token, that ends its updates (0 = off)"
    add("--early_stop_kl", type=non_negative, default=0.0, help=help)
    add("--value_loss_coeff", type=non_negative, default=0.1, help="weight of the value loss")
    add("--minibatch_size", type=count, default=0, help="sequences in a step (0 = the rollout)")
    add("--max_new_tokens", type=count, default=0, help="cap on a response (0 = up to max_len)")
    add("--missing_eos_penalty", type=non_negative, default=1.0, help="taken off without EOS")
    add("--value_clip", type=non_negative, default=0.0, help="clip range of values (0 = off)")
    add("--critic", choices=("separate", "shared"), default="separate", help="own trunk or not")
    add("--reward_fn", type=nonempty, help="file.py:function or module:function")
    help = "which label's logit is the reward, of a text classifier: its name or number"
    add("--reward_label", type=nonempty, help=help)
    units = ("none", "stored", "running")
    help = "units of scores: their own, the reward model's stored spread, or that of all so far"
    add("--normalize_reward", choices=units, default="none", help=help)
    add("--eval_samples", type=count, default=256, help="held-out prompts to judge by (0 = all)")
    add_training_arguments(parser, log_step=1, unit="rollouts")
    add_lora_arguments(parser, dropout=0.0)
    help = "policy, reference, critic and reward model as adapters on one trunk; needs --use_peft"
    add_boolean(parser, "--share_trunk", default=False, help=help)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.rm_model_path and not args.reward_fn:
        parser.error("one of --rm_model_path and --reward_fn is required")
    if args.reward_fn and args.reward_label is not None:
        told = f"--reward_label={args.reward_label} is for a text classifier as reward model"
        parser.error(f"{told}: leave it out, or --reward_fn")
    if args.reward_fn and args.normalize_reward == "stored":
        parser.error("--normalize_reward=stored: --reward_fn has nothing stored; give running")
    if 0 < args.max_new_tokens < args.min_gen_len:
        limits = f"--max_new_tokens={args.max_new_tokens} is less than --min_gen_len"
        parser.error(f"{limits}={args.min_gen_len}: no response could end")
    if args.share_trunk and not args.use_peft:
        parser.error("--share_trunk needs --use_peft: add it, or leave --share_trunk out")
    if args.share_trunk and args.critic == "shared":
        parser.error("--share_trunk gives the critic an adapter: leave --critic=shared out")
    if args.share_trunk and args.compile:
        parser.error("--share_trunk and --compile: each adapter would be compiled anew; leave one")
    check_advantage(parser, args)
    if args.reward_fn and args.max_reward != parser.get_default("max_reward"):
        parser.error(
            f"--max_reward={args.max_reward:g} is of reward models, not --reward_fn: omit it"
        )
    if args.early_stop_kl and args.num_inner_epoch == 1 and not args.minibatch_size:
        told = (
            f"--early_stop_kl={args.early_stop_kl:g}: a rollout has but one step, which is always"
        )
        parser.error(f"{told} taken; raise --num_inner_epoch or set --minibatch_size")
    if args.kl_controller == "adaptive" and args.beta == 0:
        parser.error("--beta=0 with --kl_controller=adaptive: would stay 0; start above it")
    if args.kl_controller == "fixed" and args.target_kl != parser.get_default("target_kl"):
        told = f"--target_kl={args.target_kl:g} needs --kl_controller=adaptive"
        parser.error(f"{told}: add it, or leave --target_kl out")
    return check_lora_arguments(parser, args)


def check_advantage(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse groups in which nothing can be compared, and a critic's arguments without one."""
    several, told = args.num_responses > 1, f"--num_responses={args.num_responses}"
    for flag, is_sure in (
        ("do_sampling=false", not args.do_sampling),
        ("top_k=1", args.top_k == 1),
    ):
        if several and is_sure:
            parser.error(f"{told} with --{flag}: all would be the same; leave one out")
    if args.advantage == "gae":
        return
    if not several:
        parser.error(f"--advantage={args.advantage} compares responses: {told} must be at least 2")
    for name in OF_CRITIC:
        value = getattr(args, name)
        if value != parser.get_default(name):
            told = f"--{name}={value} needs a critic, which --advantage={args.advantage} has not"
            parser.error(f"{told}: leave --{name} out")


def main(args: argparse.Namespace) -> None:
    runtime = start_runtime(args.gpu_id, dtype=args.dtype, seed=args.seed, report_to=args.report_to)
    if runtime.zero_stage:
        raise InputError(
            "PPO's models are not cut up between processes, since its rollouts run them too often;"
            " start it by configs/multi_gpu.yaml, with --use_peft if memory is short"
        )
    size = "batch_size" if args.num_responses == 1 else "batch_size times --num_responses"
    sizes = {size: args.batch_size * args.num_responses, "minibatch_size": args.minibatch_size}
    require_equal_shares(**sizes)
    say(runtime.notice)
    say(changed_since_written(args.data_dir))
    inputs = {"--sft_model_path": args.sft_model_path, "--data_dir": args.data_dir}
    if args.reward_fn:
        inputs["--reward_fn"] = file_of(args.reward_fn)
    else:
        inputs["--rm_model_path"] = args.rm_model_path
    with RunFolder(
        args.ckpt_dir,
        stage="ppo",
        inputs=inputs,
        arguments=vars(args),
        defaults=vars(parse_args(["--sft_model_path=x", "--rm_model_path=x"])),
        data=fingerprint(args.data_dir),
        resume=args.resume,
        keep=args.keep,
    ) as folder:
        if folder.standing == "finished":
            say(folder.finished_line())
        else:
            train(args, runtime, folder)


def train(args: argparse.Namespace, runtime: Runtime, folder: RunFolder) -> None:
    flag, sft_path = "--sft_model_path", args.sft_model_path
    tokenizer = load_tokenizer(sft_path, flag=flag, kind=LANGUAGE_MODEL, max_len=args.max_len)
    rm_path, mean_reward, scale = None, 0.0, ScoreScale()
    if args.reward_fn:
        score = score_by_function(args.reward_fn)
        say(f"reward: what {args.reward_fn} returns")
    else:
        known = read_judge(
            args.rm_model_path,
            tokenizer,
            max_len=args.max_len,
            max_reward=args.max_reward,
            label=args.reward_label,
            needs_spread=args.normalize_reward == "stored",
            shared_with=sft_path if args.share_trunk else None,
        )
        if isinstance(known, RewardFacts):  # on whose trunk a critic can begin
            rm_path, mean_reward = args.rm_model_path, known.reward_mean
            if args.normalize_reward == "stored":
                scale = stored_scale(known, path=rm_path)
    if args.normalize_reward != "none":
        mean_reward = 0.0  # in its units
    limits = {"max_len": args.max_len, "min_len": args.min_gen_len}
    read = partial(load_prompts, args.data_dir, tokenizer=tokenizer, **limits)
    with main_first():
        prompts = read("train", args.max_samples)
        heldout = read("eval", args.eval_samples)
    room = Room(args.micro_batch_size)
    policy, ref_policy, critic = load_models(
        sft_path,
        rm_path,
        critic=args.critic if args.advantage == "gae" else "none",
        mean_reward=mean_reward,
        lora=lora_options(args) if args.use_peft else None,
        share_trunk=args.share_trunk,
        gradient_checkpointing=args.gradient_checkpointing,
        compile=args.compile,
        device=runtime.device,
        pad_id=tokenizer.pad_token_id,
    )
    say(COMPILING if args.compile else "")
    penalty = Penalty(args.beta).to(runtime.device)
    modules = {"policy": policy, "penalty": penalty, "scale": scale.to(runtime.device)}
    if critic:
        modules["critic"] = critic
    if args.use_peft:
        say(trained_share(*modules.values()))
    sampling = build_sampling(vars(args), tokenizer, policy)
    actors = Actors(policy, ref_policy, critic, sampling, runtime)
    if not args.reward_fn:
        score = load_judge(
            known,
            args.rm_model_path,
            trunk=policy if args.share_trunk else None,
            max_len=args.max_len,
            pad_id=tokenizer.pad_token_id,
            runtime=runtime,
        )
    set_generation_defaults(policy, tokenizer, **sampling.generation_config())

    plan = plan_epochs(
        [len(ids) for ids in prompts.ids],
        args.batch_size,
        num_epochs=args.num_outer_epoch,
        max_steps=args.max_steps,
        seed=args.seed,
    )
    judge = partial(evaluate, args, actors, tokenizer, score, scale, heldout)
    # Whatever may fail does so here, before an earlier run is moved away.
    untrained = None
    if folder.standing == "new":
        untrained, room = fit(judge, room, runtime.device)
    say(decoder_name(policy))
    say(sampling.warning())
    say(folder.start())
    metrics = Metrics(
        folder.path,
        num_steps=sum(map(len, plan)),
        log_step=args.log_step,
        report=start_trackers(args.report_to, folder=folder.path, arguments=vars(args)),
        console=[
            *CONSOLE,
            *(["loss/value_avg"] if critic else []),
            *(["objective/beta"] if args.kl_controller == "adaptive" else []),
            *(["num_updates"] if args.early_stop_kl else []),
        ],
    )
    schedules = build_schedules(args, policy, critic, plan)
    with Progress(
        folder,
        plan,
        modules=modules,
        schedules=schedules,
        metrics=metrics,
        room=room,
        save_every=args.save_every,
        seed=args.seed,
    ) as progress:
        if not metrics.rows:
            metrics.add_epoch(0, *(untrained or progress.fitting(judge)))
            if critic and not rm_path and args.normalize_reward == "none":
                torch.nn.init.constant_(critic.head.bias, metrics.rows[0]["eval_scores"])
        for epoch, batches in progress.left():
            for rows, done in batches:
                # 1 to 4: rollout, score, reward, advantage
                experience = Experience.of(progress.carried) or gather(
                    args, actors, tokenizer, prompts, score, scale, progress, rows, penalty
                )
                # 5 update: several passes of clipped gradient steps over the rollout
                asked = [row for row in rows for _ in range(args.num_responses)]  # (B,)
                updates, num_taken = update(args, actors, progress, experience, names=asked)
                # 6 report
                seen = rollout_metrics(experience, max_kl_div=args.max_kl_div)
                report = {**seen, **updates, "lr": experience.learning_rate}
                if args.early_stop_kl:
                    report["num_updates"] = num_taken
                num_tokens = int(experience.rollout.batch.mask.sum())
                with progress.whole():
                    progress.carried = {}
                    if args.normalize_reward == "running":  # once, however often it was sampled
                        scale.learn(experience.scores)
                    skip_steps(schedules, num_updates(args, len(rows)) - num_taken)
                    if args.kl_controller == "adaptive":
                        report["objective/beta"] = penalty.beta
                        kl = seen["objective/kl"]
                        penalty.beta = adaptive_beta(penalty.beta, kl, target_kl=args.target_kl)
                    is_logged = metrics.add(report, epoch=done, num_tokens=num_tokens)
                if is_logged:
                    show_samples(
                        judged_samples(
                            prompts.select(asked).texts,
                            decode_responses(tokenizer, experience.rollout),
                            score=experience.scores,
                            kl=experience.numbers.kl.sum(dim=1),  # (B,) nats
                        )
                    )
            results, samples = progress.fitting(judge)
            with progress.whole():
                folder.save_epoch(
                    policy,
                    tokenizer,
                    epoch=epoch,
                    figure=f"reward={results['eval_scores']:.2f}",
                    objective=-results["eval_objective"],
                    facts={"metrics": results, "before_training": metrics.rows[0]},
                )
                metrics.add_epoch(epoch, results, samples)
    metrics.finish(
        build_panels(args),
        best=folder.path / "best",
        next_step=command(
            "exec_run_eval.sh",
            model_path=(f"PPO={folder.path}/best", "PPO=.model/ppo/best"),
        ),
    )
    folder.finish()


def build_panels(args: argparse.Namespace) -> list[Panel]:
    """What training.png shows; what a run has not, such as a critic, is left out there."""
    target = ("target_kl", args.target_kl) if args.kl_controller == "adaptive" else None
    stop = ("early_stop_kl", args.early_stop_kl) if args.early_stop_kl else None
    return [
        Panel("score of a response", ["objective/scores", "eval_scores"]),
        Panel("KL from the SFT model, nats a response", ["objective/kl", "eval_kl"], target),
        Panel("entropy, nats a token", ["policy/entropy_avg"]),
        Panel("share of tokens clipped", ["policy/clipfrac_avg"]),
        Panel("tokens of a response", ["response_length", "eval_length"]),
        Panel("share of responses that end", ["eos_rate", "eval_eos_rate"]),
        Panel("KL of the updates, nats a token", ["policy/approxkl_avg"], stop),
        Panel("value loss", ["loss/value_avg"]),
        Panel("variance that the critic explains", ["explained_variance"]),
        Panel("weight of the KL", ["objective/beta"]),
    ]


def gather(
    args: argparse.Namespace,
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    score: Scorer,
    scale: ScoreScale,
    progress: Progress,
    rows: list[int],
    penalty: Penalty,
) -> Experience:
    """Let the policy answer a batch of prompts, and judge every token of what it wrote."""
    step, each = progress.metrics.step + 1, args.num_responses
    # 1 rollout: write responses to each prompt; those of one prompt stand side by side
    names = [row * each + k for row in rows for k in range(each)]  # for the sampling noise
    own = share_of(names) or names[:1]  # whoever gets none does the first too, to no effect
    asked = prompts.select(name // each for name in own)
    rollout = progress.fitting(partial(roll_out, actors, asked.ids, own, (args.seed, step)))
    # 2 score: judge whole responses; one that did not end by itself pays for it
    judge = partial(score_responses, args, score, tokenizer, asked.texts, rollout)
    scores = progress.fitting(judge)  # (B,)
    # 3 reward: the score on the last token, the KL penalty on every token
    numbers = progress.fitting(partial(token_numbers, actors, rollout))  # (B, R) each
    if step == 1:
        progress.fitting(partial(check_ratio_is_one, actors, rollout, numbers))
    # From here on, every process has the whole rollout.
    rollout, numbers, scores = join_processes(rollout, numbers, scores, size=len(names))
    mask = rollout.batch.response_mask  # (B, R)
    units = copy.deepcopy(scale)
    if args.normalize_reward == "running":  # of all scores so far, these included
        units.learn(scores)
    normalized, beta = units(scores), float(penalty.beta)
    rewards = token_rewards(normalized, numbers.kl, mask, beta=beta, max_kl_div=args.max_kl_div)
    # 4 advantage: how much better than the critic expected, in units of its spread; or, without
    # one, than other responses to the prompt, for each token alike
    if args.advantage == "gae":
        advantages, returns = gae(
            rewards, numbers.values, mask, gamma=args.gamma, gae_lambda=args.gae_lambda
        )  # (B, R) each
        advantages = masked_whiten(advantages, mask)
    else:
        totals = rewards.sum(dim=1).view(-1, each)  # (prompts, responses to each)
        relative = GROUP_ADVANTAGES[args.advantage](totals).view(-1, 1)  # (B, 1)
        advantages, returns = relative * mask, None
    learning_rate = torch.tensor(progress.schedules[0].get_last_lr()[0], dtype=torch.float64)
    return Experience(
        rollout, numbers, scores, normalized, rewards, advantages, returns, learning_rate
    )


def score_responses(
    args: argparse.Namespace,
    score: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    rollout: Rollout,
    room: Room,
) -> Tensor:  # (B,)
    """Score responses; one that was cut off stays as it is and pays `missing_eos_penalty`."""
    responses = decode_responses(tokenizer, rollout)
    scores = score(prompts, responses, rollout.batch, rollout.ended, room)
    return scores - args.missing_eos_penalty * (~rollout.ended).float()


def build_schedules(
    args: argparse.Namespace,
    policy: PreTrainedModel,
    critic: Critic | None,
    plan: list[list[PlannedBatch]],
) -> list[LambdaLR]:
    """Build an optimiser each for policy and critic, or one for both where they share a trunk."""
    num_steps = sum(num_updates(args, len(batch.rows)) for batches in plan for batch in batches)
    groups = [[*policy.parameters()]]
    if critic:
        own = {id(weight) for weight in critic.parameters()}  # its adapter may lie in the policy
        groups = [[p for p in groups[0] if id(p) not in own], [*critic.parameters()]]
    if args.critic == "shared":
        groups = [groups[0] + groups[1]]
    return [
        build_schedule(
            group, learning_rate=args.learning_rate, num_steps=num_steps, warmup_ratio=0.0
        )
        for group in groups
    ]


def num_updates(args: argparse.Namespace, num_prompts: int) -> int:
    """Count the optimiser steps that are planned for a rollout."""
    size = num_prompts * args.num_responses
    return args.num_inner_epoch * math.ceil(size / (args.minibatch_size or size))


def token_terms(
    args: argparse.Namespace, actors: Actors, experience: Experience, rows: Tensor, batch: Batch
) -> dict[str, Tensor]:  # (B, R) each
    """Losses and diagnostics of a micro-batch, which holds these rows of the rollout."""
    here = (rows, slice(batch.response_ids.shape[1]))
    old, advantages = experience.numbers, experience.advantages[here]
    logprobs, values = policy_forward(actors, experience.rollout, rows, batch)
    policy_losses = ppo_policy_loss(logprobs, old.logprobs[here], advantages, epsilon=args.epsilon)
    with torch.no_grad():
        log_ratio = logprobs - old.logprobs[here]
        ratio = log_ratio.exp()
    terms = {
        "loss/policy_avg": policy_losses,
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        "policy/clipfrac_avg": (policy_losses > -ratio * advantages).float(),
        "val/ratio": ratio,
    }
    if experience.returns is None:  # without a critic
        return terms
    returns = experience.returns[here]
    value_losses = value_loss(values, old.values[here], returns, value_clip=args.value_clip)
    is_clipped = value_losses > 0.5 * (values - returns).square()
    return {**terms, "loss/value_avg": value_losses, "val/clipfrac_avg": is_clipped.float()}


def add_gradient(
    args: argparse.Namespace,
    actors: Actors,
    experience: Experience,
    minibatch: list[int],
    room: Room,
) -> dict[str, Tensor]:
    """Add the gradient of a minibatch to the weights'; returns means over its tokens.

    How it is cut into micro-batches changes nothing.
    """
    num_tokens = experience.mask[minibatch].sum()
    names = ["loss", *POLICY_TERMS, *(VALUE_TERMS if actors.critic else [])]
    totals = {name: torch.zeros((), device=num_tokens.device) for name in names}
    own = share_of(minibatch)
    for rows, batch in micro_batches_by_length(experience.rollout.batch, own, room):
        terms = token_terms(args, actors, experience, rows, batch)
        means = {name: masked_sum(x, batch.response_mask) / num_tokens for name, x in terms.items()}
        loss = means["loss/policy_avg"]
        if actors.critic:
            loss = loss + args.value_loss_coeff * means["loss/value_avg"]
        loss.backward()
        for name, mean in {**means, "loss": loss}.items():
            totals[name] = totals[name] + mean.detach()
    return {name: sum_over_processes(total) for name, total in totals.items()}


def update(
    args: argparse.Namespace,
    actors: Actors,
    progress: Progress,
    experience: Experience,
    *,
    names: Sequence[int],  # (B,)  what the prompts are called if something goes wrong
) -> tuple[dict[str, Tensor], int]:
    """Take the optimiser steps of one rollout, up to one that comes when the policy has moved far.

    Each step is a whole one: a run that is stopped in between goes on with the next.
    Returns the means of what was seen on the way, and the number of steps.
    """
    step, size = progress.metrics.step + 1, len(experience.mask)
    minibatches: list[list[int]] = []
    for inner_epoch in range(args.num_inner_epoch):
        rng = random.Random(f"{args.seed}/{step}/{inner_epoch}")
        shuffled, most = rng.sample(range(size), size), args.minibatch_size or size
        minibatches += [shuffled[start : start + most] for start in range(0, size, most)]
    seen = {name: [*x] for name, x in progress.carried.items() if name in UPDATE_METRICS}
    num_done = len(seen.get("grad_norm", []))
    actors.policy.train()  # without dropout, this does nothing but allow gradient checkpointing
    for minibatch in minibatches[num_done:]:
        means = progress.fitting(partial(add_gradient, args, actors, experience, minibatch))
        if seen and 0 < args.early_stop_kl < float(means["policy/approxkl_avg"]):
            break
        with progress.whole():
            means["grad_norm"] = optimizer_step(
                progress.schedules,
                means.pop("loss"),
                max_gradient_norm=args.max_gradient_norm,
                where=f"rollout {step}, prompts {[names[i] for i in minibatch]}",
            )
            for name, mean in means.items():
                seen.setdefault(name, []).append(mean)
            so_far = {name: torch.stack(values) for name, values in seen.items()}
            progress.carried = {**experience.tensors(), **so_far}
    actors.policy.eval()
    means = {name: torch.stack(seen[name]).mean() for name in UPDATE_METRICS if name in seen}
    return means, len(seen["grad_norm"])


@torch.no_grad()
def evaluate(
    args: argparse.Namespace,
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    score: Scorer,
    scale: ScoreScale,
    heldout: Prompts,
    room: Room,
) -> tuple[dict[str, float], Samples]:
    """Judge the policy on fixed prompts with fixed noise: score, KL, and their balance.

    All in the scores' own units, in which training's objective is so many times as large. Returns
    the first responses too.
    """
    actors = actors._replace(critic=None)
    columns: list[Tensor] = []
    samples: Samples = []
    everything = range(len(heldout.ids))
    here = share_of(everything) or everything[:1]
    for start in range(0, len(here), EVAL_BATCH):
        rows = here[start : start + EVAL_BATCH]
        noise_key = (args.seed, 0)  # no training step has this one
        asked = heldout.select(rows)
        rollout = roll_out(actors, asked.ids, rows, noise_key, room)
        scores = score_responses(args, score, tokenizer, asked.texts, rollout, room)
        kl = token_numbers(actors, rollout, room).kl.sum(dim=1)
        lengths = rollout.batch.response_mask.sum(dim=1)
        columns.append(torch.stack((scores, kl, lengths, rollout.ended)))
        if start == 0:
            responses = decode_responses(tokenizer, rollout)
            samples = judged_samples(asked.texts, responses, score=scores, kl=kl)
    judged = join_rows(torch.cat(columns, dim=1).T, len(everything))  # (B, 4)
    scores, kl, lengths, ended = judged.unbind(dim=1)  # (B,) each
    metrics = {
        "eval_scores": float(scores.mean()),
        "eval_kl": float(kl.mean()),
        "eval_objective": float((scores - args.beta * float(scale.std) * kl).mean()),
        "eval_length": float(lengths.mean()),
        "eval_eos_rate": float(ended.mean()),
    }
    return metrics, samples


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
