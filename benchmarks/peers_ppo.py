"""One PPO iteration: ours, the plain way, and TRL's. bench_peers.py measures it as "ppo".

An iteration, on the same prompts for everybody: sample exactly NEW_TOKENS tokens for each; score
the responses; take the numbers before the update, of policy, reference and value model; GAE; and
as many inner epochs as run_ppo.py's default, each of one optimiser step on the whole rollout, for
policy and value model. All four models are of GPT-2's shape, with random weights; value and reward
model have trunks of their own.

- `ours` is the loop of run_ppo.py, with its defaults, but for the sampling.
- `plain` is what small repositories do: HF's `generate` on one prompt after another, everything
  padded to one length, an attention mask, and a log-softmax over the vocabulary at every position.
- TRL's last PPO trainer runs in a process of its own, ppo_peer.py. It takes the old logprobs from
  the sampler, so it has one forward less.

Four such models with their optimisers are 4 GB for each contender; `--ppo_micro_batch` rows in a
forward, the same for all, bound what activations take besides.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import run_ppo
from rlhf.actors import Actors, load_models
from rlhf.batches import PlannedBatch, Room
from rlhf.experience import Penalty
from rlhf.models import load_reward_model
from rlhf.prompts import Prompts
from rlhf.rewards import RewardFacts, ScoreScale, score_by_model
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling

NEW_TOKENS = 48
MANY = 1_000_000  # iterations; the learning rate falls to 0 over them
# What `start_runtime` does to the C library's allocator, for the other process.
KEEP_FREED_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"
Step = Callable[[], float]


class Task(NamedTuple):
    """What all contenders are given."""

    prompts: list[list[int]]
    config: GPT2Config
    micro_batch: int  # rows in a forward, 0 = as each likes
    dtype: str
    runtime: Runtime


def ppo_steps(task: Task, peer_python: str | None) -> dict[str, Step]:
    """The contenders, each built when it first takes its turn."""

    @functools.cache
    def checkpoints() -> tuple[Any, str, str]:
        torch.manual_seed(0)
        task.config.num_labels = 1
        folder = tempfile.TemporaryDirectory()
        GPT2LMHeadModel(task.config).save_pretrained(f"{folder.name}/sft")
        GPT2ForSequenceClassification(task.config).save_pretrained(f"{folder.name}/rm")
        return folder, f"{folder.name}/sft", f"{folder.name}/rm"

    steps = {
        "ours": when_needed(lambda: our_ppo(task, *checkpoints()[1:])),
        "plain": when_needed(lambda: plain_ppo(task, *checkpoints()[1:])),
    }
    if peer_python is None:
        print("ppo: without TRL; --ppo_python names the Python of benchmarks/requirements-ppo.txt")
        return steps
    ask = "import importlib.metadata as m; print(m.version('trl'))"
    version = subprocess.run(
        [peer_python, "-E", "-c", ask], check=True, capture_output=True, text=True
    )
    steps[f"TRL {version.stdout.strip()}"] = when_needed(lambda: trl_ppo(task, peer_python))
    return steps


def when_needed(build: Callable[[], Step]) -> Step:
    """Build a step at its first call, which is the one that warms up."""
    built = functools.cache(build)
    return lambda: built()()


# Ours


def tokenizer_of_words(config: GPT2Config) -> PreTrainedTokenizerFast:
    """Give every id a word of its own, so that responses can be written out as text."""
    words = {f"w{i}": i for i in range(config.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        eos_token=f"w{config.eos_token_id}",
        pad_token=f"w{config.eos_token_id}",
    )


class NeverStopped:
    """What run_ppo.py needs of `rlhf.resume.Progress`, without a disk."""

    def __init__(self, room: Room, schedules: list[LambdaLR]) -> None:
        self.room, self.schedules, self.carried = room, schedules, {}
        self.metrics = argparse.Namespace(step=1)  # the ratio is checked once in a run, at step 0

    def fitting(self, attempt: Callable[[Room], Any]) -> Any:
        return attempt(self.room)

    def whole(self) -> AbstractContextManager:
        return nullcontext()

    def next_step(self) -> None:
        self.metrics.step, self.carried = self.metrics.step + 1, {}


def our_ppo(task: Task, sft_path: str, rm_path: str) -> Step:
    args = run_ppo.parse_args(
        [
            f"--sft_model_path={sft_path}",
            f"--rm_model_path={rm_path}",
            f"--dtype={task.dtype}",
            f"--micro_batch_size={task.micro_batch}",
            f"--min_gen_len={NEW_TOKENS}",
            f"--max_new_tokens={NEW_TOKENS}",
            "--temperature=1",
            "--top_k=0",
        ]
    )
    eos_id, rows = task.config.eos_token_id, range(len(task.prompts))
    sampling = Sampling(
        do_sampling=args.do_sampling,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_gen_len=args.min_gen_len,
        max_new_tokens=args.max_new_tokens,
        max_len=args.max_len,
        pad_id=eos_id,
        stop_ids=[eos_id],
        early_end_ids=[eos_id],
    )
    tokenizer, penalty = tokenizer_of_words(task.config), Penalty(args.beta)
    policy, ref_policy, critic = load_models(
        sft_path,
        rm_path,
        critic=args.critic,
        mean_reward=0.0,
        lora=None,
        share_trunk=False,
        gradient_checkpointing=False,
        compile=False,
        device=task.runtime.device,
        pad_id=eos_id,
    )
    actors = Actors(policy, ref_policy, critic, sampling, task.runtime)
    score = score_by_model(
        load_reward_model(rm_path, flag="--x", device=task.runtime.device, pad_id=eos_id),
        RewardFacts("pairwise", args.max_reward, logit_mean=0.0, reward_mean=0.0),
        runtime=task.runtime,
    )
    plan = [[PlannedBatch(list(rows), 0.0)] * MANY]
    schedules = run_ppo.build_schedules(args, policy, critic, plan)
    progress = NeverStopped(Room(args.micro_batch_size), schedules)
    prompts = Prompts(task.prompts, [""] * len(rows))

    def iterate() -> float:
        experience = run_ppo.gather(
            args, actors, tokenizer, prompts, score, ScoreScale(), progress, rows, penalty
        )
        mask = experience.mask  # (B, R)
        assert mask.all() and mask.shape[1] == NEW_TOKENS
        updates, _ = run_ppo.update(args, actors, progress, experience, names=rows)
        progress.next_step()
        return float(updates["loss/policy_avg"])

    return iterate


# The plain way


@torch.no_grad()
def plain_rollout(
    policy: GPT2LMHeadModel, prompts: list[list[int]], runtime: Runtime
) -> tuple[Tensor, Tensor, Tensor]:  # ids, attention mask, response mask: (B, T) each
    """Write responses one by one, and pad them on the right to one length."""
    rows, eos_id = [], policy.config.eos_token_id
    for prompt in prompts:
        with runtime.autocast():
            row = policy.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=True,
                top_k=0,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=eos_id,
                eos_token_id=eos_id,
            )
        rows.append(row[0])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos_id)
    ends = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(ids.shape[1])
    return ids, (places < ends).long(), (places < ends) & (places >= ends - NEW_TOKENS)


def plain_logprobs(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor, response: Tensor) -> Tensor:
    logprobs = model(ids, attention_mask=mask).logits.float().log_softmax(dim=2)[:, :-1]
    chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return chosen[response[:, 1:]].view(-1, NEW_TOKENS)  # (B, R)


def plain_values(model: GPT2ForSequenceClassification, ids: Tensor, mask: Tensor) -> Tensor:
    states = model.transformer(ids, attention_mask=mask).last_hidden_state
    return model.score(states)[..., 0].float()  # (B, T)


def plain_ppo(task: Task, sft_path: str, rm_path: str) -> Step:
    policy, reference = (GPT2LMHeadModel.from_pretrained(sft_path).eval() for _ in range(2))
    value_model, reward_model = (
        GPT2ForSequenceClassification.from_pretrained(rm_path).eval() for _ in range(2)
    )
    trained = (policy, value_model)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5) for model in trained]
    num_rows, num_epochs = len(task.prompts), run_ppo.build_parser().get_default("num_inner_epoch")
    parts = torch.arange(num_rows).split(task.micro_batch or num_rows)

    @torch.no_grad()
    def numbers(ids: Tensor, mask: Tensor, response: Tensor) -> tuple[Tensor, ...]:
        with task.runtime.autocast():
            logprobs = plain_logprobs(policy, ids, mask, response)
            ref_logprobs = plain_logprobs(reference, ids, mask, response)
            values = plain_values(value_model, ids, mask)[:, :-1]
            scores = plain_values(reward_model, ids, mask)
        scores = scores.gather(1, mask.sum(dim=1, keepdim=True) - 1)[:, 0]
        return logprobs, ref_logprobs, values[response[:, 1:]].view(-1, NEW_TOKENS), scores

    def iterate() -> float:
        whole = plain_rollout(policy, task.prompts, task.runtime)
        columns = zip(*(numbers(*(x[rows] for x in whole)) for rows in parts), strict=True)
        old_logprobs, ref_logprobs, old_values, scores = (torch.cat(column) for column in columns)
        rewards = -0.2 * (old_logprobs - ref_logprobs)
        rewards[:, -1] += scores
        gained, advantage = [], torch.zeros(num_rows)
        for t in reversed(range(NEW_TOKENS)):
            after = old_values[:, t + 1] if t + 1 < NEW_TOKENS else 0.0
            advantage = rewards[:, t] + after - old_values[:, t] + 0.9 * advantage
            gained.insert(0, advantage)
        advantages = torch.stack(gained, dim=1)
        returns = advantages + old_values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        total = 0.0
        for _ in range(num_epochs):
            total = 0.0
            for rows in parts:
                ids, mask, response = (x[rows] for x in whole)
                with task.runtime.autocast():
                    logprobs = plain_logprobs(policy, ids, mask, response)
                    values = plain_values(value_model, ids, mask)[:, :-1]
                values = values[response[:, 1:]].view(-1, NEW_TOKENS)
                ratio = (logprobs - old_logprobs[rows]).exp()
                clipped = ratio.clamp(0.8, 1.2)
                gain = torch.minimum(ratio * advantages[rows], clipped * advantages[rows]).mean()
                value_loss = 0.5 * (values - returns[rows]).square().mean()
                loss = (-gain + 0.1 * value_loss) * len(rows) / num_rows
                loss.backward()
                total += float(loss.detach())
            for model, optimizer in zip(trained, optimizers, strict=True):
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return total

    return iterate


# TRL's, in its own environment


def trl_ppo(task: Task, peer_python: str) -> Step:
    shape = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    settings = {
        "model": {name: getattr(task.config, name) for name in shape},
        "prompts": task.prompts,
        "new_tokens": NEW_TOKENS,
        "micro_batch_size": task.micro_batch,
        "num_inner_epochs": run_ppo.build_parser().get_default("num_inner_epoch"),
        "learning_rate": run_ppo.build_parser().get_default("learning_rate"),
        "seed": 0,
        "dtype": task.dtype,
        "threads": torch.get_num_threads(),
    }
    path = Path(tempfile.mkdtemp()) / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    peer = subprocess.Popen(  # it ends when its standard input does
        [peer_python, "-E", str(Path(__file__).parent / "ppo_peer.py"), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"GLIBC_TUNABLES": KEEP_FREED_MEMORY},
    )
    columns = max(map(len, task.prompts)) + NEW_TOKENS

    def answer() -> dict[str, Any]:
        assert peer.stdout is not None
        line = peer.stdout.readline()
        if not line:
            sys.exit(f"TRL's process ended ({peer.wait()}); to see why: {' '.join(peer.args)}")
        return json.loads(line)

    print("ppo:", answer())

    def iterate() -> float:
        assert peer.stdin is not None
        peer.stdin.write("go\n")
        peer.stdin.flush()
        figures = answer()
        assert figures["columns"] == columns, "TRL ended responses early"
        return figures["loss/policy_avg"]

    return iterate
