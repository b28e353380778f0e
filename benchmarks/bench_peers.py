"""Our steps beside TRL's and beside the plain way, on the same model, batch, precision and machine.

    pip install -r requirements.txt -r benchmarks/requirements.txt -c constraints.txt
    python benchmarks/bench_peers.py --quick

GPT-2's shape (124M), random weights, and generated ids with lengths like those of real pairs: no
network. A step is forward and backward over one batch, the reference's forward included in DPO; the
optimiser is the same for all and left out. `plain` is what small repositories do: everything padded
to one length, an attention mask, log-softmax over the whole vocabulary at every position, four
forwards for DPO, responses written one by one. All contenders take turns; medians over the rounds.

The floor is the time of the matrix products that are really needed (no padding, vocabulary at
response positions only) at the rate of a large product, measured in the same run.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy, logsigmoid  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel  # noqa: E402

import run_dpo  # noqa: E402
import run_sft  # noqa: E402
from rlhf.batches import build_batch, micro_batches, sample_length  # noqa: E402
from rlhf.generation import generate  # noqa: E402
from rlhf.losses import pairwise_reward_loss  # noqa: E402
from rlhf.models import reward_logits  # noqa: E402
from rlhf.runtime import Runtime, start_runtime  # noqa: E402
from rlhf.sampling import Sampling  # noqa: E402
from rlhf.tokens import Sample  # noqa: E402
from toyworld.tables import markdown_table  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
EOS = 50256
Step = Callable[[], float]  # does the work, returns the loss


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="half the batch and three rounds: under 15 minutes")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--max_len", type=int, default=256, help="tokens of prompt and response")
    add("--rows", type=int, default=16, help="sequences in a batch; half as many pairs")
    add("--rounds", type=int, default=5)
    add("--only", nargs="+", default=["sft", "dpo", "rm", "rollout"], help="what to measure")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds = min(args.rows, 8), min(args.rounds, 3)
    return args


def draw_samples(rng: random.Random, count: int, max_len: int) -> list[tuple[Sample, Sample]]:
    """Pairs of ids with lengths like UltraFeedback's: medians 82, 215, 192; cut at max_len."""
    pairs = []
    for _ in range(count):
        prompt = rng.choices(
            range(1000, 50000), k=min(int(rng.lognormvariate(4.4, 1)), max_len - 8)
        )
        lengths = [max(4, int(rng.lognormvariate(mu, 0.9))) for mu in (5.37, 5.26)]
        responses = [
            rng.choices(range(1000, 50000), k=min(length, max_len - len(prompt)))
            for length in lengths
        ]
        pairs.append((Sample(prompt, responses[0]), Sample(prompt, responses[1])))
    return pairs


# The plain way


def plain_batch(samples: list[Sample], max_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad everything to max_len on the right: ids, attention mask, response mask, (B, T) each."""
    ids = torch.full((len(samples), max_len), EOS)
    mask, response = torch.zeros_like(ids), torch.zeros_like(ids).bool()
    for row, (prompt, answer) in enumerate(samples):
        whole = [*prompt, *answer]
        ids[row, : len(whole)] = torch.tensor(whole)
        mask[row, : len(whole)] = 1
        response[row, len(prompt) : len(whole)] = True
    return ids, mask, response


def plain_logprobs(model: GPT2LMHeadModel, samples: list[Sample], max_len: int) -> Tensor:  # (B,)
    ids, mask, response = plain_batch(samples, max_len)
    logprobs = model(ids, attention_mask=mask).logits.float().log_softmax(dim=2)[:, :-1]
    chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return (chosen * response[:, 1:]).sum(dim=1)


def plain_sft(model: GPT2LMHeadModel, samples: list[Sample], args: Any, runtime: Runtime) -> float:
    ids, mask, response = plain_batch(samples, args.max_len)
    with runtime.autocast():
        logits = model(ids, attention_mask=mask).logits.float()
    labels = ids.masked_fill(~response, -100)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def plain_dpo(model: Any, ref: Any, pairs: list[Any], args: Any, runtime: Runtime) -> float:
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    with runtime.autocast():
        with torch.no_grad():
            ref_gap = plain_logprobs(ref, chosen, args.max_len)
            ref_gap = ref_gap - plain_logprobs(ref, rejected, args.max_len)
        gap = plain_logprobs(model, chosen, args.max_len)
        gap = gap - plain_logprobs(model, rejected, args.max_len)
    loss = -logsigmoid(0.2 * (gap - ref_gap)).mean()
    loss.backward()
    return float(loss.detach())


def plain_rm(model: Any, pairs: list[Any], args: Any, runtime: Runtime) -> float:
    ids, mask, _ = plain_batch([p[0] for p in pairs] + [p[1] for p in pairs], args.max_len)
    with runtime.autocast():
        chosen, rejected = model(ids, attention_mask=mask).logits[:, 0].float().chunk(2)
    loss = -logsigmoid(chosen - rejected).mean()
    loss.backward()
    return float(loss.detach())


# Ours: the functions of the scripts themselves


def our_sft(model: GPT2LMHeadModel, samples: list[Sample], runtime: Runtime) -> float:
    samples = sorted(samples, key=sample_length)  # as `epoch_order` deals them
    num_tokens, total = sum(len(s.response_ids) for s in samples), 0.0
    for part in micro_batches([sample_length(s) for s in samples], 0):
        batch = build_batch(samples[part], EOS)
        loss = run_sft.summed_loss(model, batch, runtime) / num_tokens
        loss.backward()
        total += float(loss.detach())
    return total


def our_dpo(model: GPT2LMHeadModel, pairs: list[Any], runtime: Runtime) -> float:
    pairs = sorted(pairs, key=lambda pair: max(map(sample_length, pair)))
    settings = argparse.Namespace(micro_batch_size=0)
    ref_logprobs = run_dpo.all_logprobs(model, pairs, EOS, settings, runtime)
    total, lengths = 0.0, [max(map(sample_length, pair)) for pair in pairs]
    for part in micro_batches(lengths, 0, sequences_per_row=2):
        logprobs = run_dpo.pair_logprobs(model, pairs[part], EOS, runtime)
        terms = run_dpo.preference_terms(logprobs, ref_logprobs[part], 0.2)
        loss = terms["loss"].sum() / len(pairs)
        loss.backward()
        total += float(loss.detach())
    return total


def our_rm(model: Any, pairs: list[Any], runtime: Runtime) -> float:
    pairs = sorted(pairs, key=lambda pair: max(map(sample_length, pair)))
    total, lengths = 0.0, [max(map(sample_length, pair)) for pair in pairs]
    for part in micro_batches(lengths, 0, sequences_per_row=2):
        samples = [pair[0] for pair in pairs[part]] + [pair[1] for pair in pairs[part]]
        with runtime.autocast():
            logits = reward_logits(model, build_batch(samples, EOS), eos_id=EOS)
        loss = pairwise_reward_loss(*logits.chunk(2)).sum() / len(pairs)
        loss.backward()
        total += float(loss.detach())
    return total


# TRL's trainers, each given the same ids


def tokenizer_for_trl() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": EOS, "x": 0}, unk_token="x"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )


def trl_step(kind: str, model: Any, rows: list[dict[str, Any]], args: argparse.Namespace) -> Step:
    """One `training_step` of TRL's trainer on the batch that its own collator makes of the rows."""
    import trl

    texts = {"SFT": ("text",), "DPO": ("prompt", "chosen", "rejected")}
    columns = texts.get(kind, ("chosen", "rejected"))
    options: dict[str, Any] = {"beta": 0.2} if kind == "DPO" else {}
    config = getattr(trl, f"{kind}Config")(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        bf16=args.dtype == "bfloat16",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    reference = {}
    if kind == "DPO":
        reference["ref_model"] = GPT2LMHeadModel(model.config).eval()
        reference["ref_model"].load_state_dict(model.state_dict())
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([dict.fromkeys(columns, "x x")]),  # its batches are ours
        processing_class=tokenizer_for_trl(),
        **reference,
    )
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which is not called
    batch = trainer.data_collator(rows)

    def step() -> float:
        return float(trainer.training_step(trainer.model, dict(batch)))

    return step


def trl_rows(stage: str, pairs: list[tuple[Sample, Sample]]) -> list[dict[str, Any]]:
    if stage == "sft":
        whole = [(s, [*s.prompt_ids, *s.response_ids]) for pair in pairs for s in pair]
        ignored = [[-100] * len(s.prompt_ids) + list(s.response_ids) for s, _ in whole]
        return [
            {"input_ids": ids, "labels": labels}
            for (_, ids), labels in zip(whole, ignored, strict=True)
        ]
    if stage == "dpo":
        return [
            {
                "prompt_ids": a.prompt_ids,
                "chosen_ids": a.response_ids,
                "rejected_ids": b.response_ids,
            }
            for a, b in pairs
        ]
    return [
        {
            "chosen_ids": [*a.prompt_ids, *a.response_ids],
            "rejected_ids": [*b.prompt_ids, *b.response_ids],
        }
        for a, b in pairs
    ]


# Rollouts: as many tokens for everybody, so EOS is forbidden

NEW_TOKENS = 48


def our_rollout(model: GPT2LMHeadModel, prompts: list[list[int]], runtime: Runtime) -> float:
    sampling = Sampling(
        do_sampling=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_gen_len=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        max_len=1024,
        eos_id=EOS,
        early_end_ids=[EOS],
    )
    with runtime.autocast():
        generate(
            model,
            prompts,
            sampling=sampling,
            noise_key=(0, 1),
            rows=range(len(prompts)),
            micro_batch_size=0,
        )
    return 0.0


@torch.no_grad()
def transformers_rollout(
    model: GPT2LMHeadModel, prompts: list[list[int]], runtime: Runtime, *, one_by_one: bool
) -> float:
    groups = [[prompt] for prompt in prompts] if one_by_one else [prompts]
    for group in groups:
        ids = [torch.tensor(prompt).flip(0) for prompt in group]
        padded = pad_sequence(ids, batch_first=True, padding_value=EOS).flip(1)  # on the left
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).flip(1)
        with runtime.autocast():
            model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=EOS,
                eos_token_id=EOS,
            )
    return 0.0


# Measuring


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b)[0] for _ in range(8))
    return 2 * 2048**3 / best


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def needed_flops(stage: str, pairs: list[tuple[Sample, Sample]], config: GPT2Config) -> float:
    """FLOPs of the matrix products of one step: 2 a weight forwards, 4 backwards, real tokens."""
    samples = [sample for pair in pairs for sample in pair]
    trunk = 12 * config.n_layer * config.n_embd**2
    head = config.vocab_size * config.n_embd
    passes = 8 if stage == "dpo" else 6  # the reference's forward
    flops = 0.0
    for sample in samples:
        length = sample_length(sample)
        attention = config.n_layer * config.n_embd * length  # causal: half of 2 * T * D, twice
        flops += passes * length * (trunk + attention)
        flops += passes * len(sample.response_ids) * head * (stage != "rm")
    return flops


def contenders(
    args: argparse.Namespace, pairs: list[tuple[Sample, Sample]], runtime: Runtime
) -> dict[str, dict[str, Step]]:
    """Build, for each stage, what takes turns."""
    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=EOS)
    model = GPT2LMHeadModel(config).eval()
    samples = [sample for pair in pairs for sample in pair]
    found: dict[str, dict[str, Step]] = {}
    try:
        import trl  # noqa: F401
    except ImportError:
        print("TRL is not installed (benchmarks/requirements.txt): measured without it")
        peers = False
    else:
        peers = True
    if "sft" in args.only:
        found["sft"] = {
            "ours": lambda: our_sft(model, samples, runtime),
            "plain": lambda: plain_sft(model, samples, args, runtime),
        }
        if peers:
            found["sft"]["TRL"] = trl_step("SFT", model, trl_rows("sft", pairs), args)
    if "dpo" in args.only:
        reference = GPT2LMHeadModel(config).eval()
        reference.load_state_dict(model.state_dict())
        found["dpo"] = {
            "ours": lambda: our_dpo(model, pairs, runtime),
            "plain": lambda: plain_dpo(model, reference, pairs, args, runtime),
        }
        if peers:
            found["dpo"]["TRL"] = trl_step("DPO", model, trl_rows("dpo", pairs), args)
    if "rm" in args.only:
        config.num_labels = 1
        judge = GPT2ForSequenceClassification(config).eval()
        found["rm"] = {
            "ours": lambda: our_rm(judge, pairs, runtime),
            "plain": lambda: plain_rm(judge, pairs, args, runtime),
        }
        if peers:
            found["rm"]["TRL"] = trl_step("Reward", judge, trl_rows("rm", pairs), args)
    if "rollout" in args.only:
        prompts = [list(s.prompt_ids) for s in samples]
        found["rollout"] = {
            "ours": lambda: our_rollout(model, prompts, runtime),
            "plain": lambda: transformers_rollout(model, prompts, runtime, one_by_one=True),
            "generate": lambda: transformers_rollout(model, prompts, runtime, one_by_one=False),
        }
    return found


def measure(steps: dict[str, Step], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Let all take turns, once to warm up; seconds of each round, and the loss of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            elapsed, losses[name] = timed(step)
            if turn:
                seconds[name].append(elapsed)
    return seconds, losses


def main(args: argparse.Namespace) -> None:
    runtime = start_runtime(0, dtype=args.dtype, seed=0, report_to="none")
    pairs = draw_samples(random.Random(0), args.rows // 2, args.max_len)
    rate = matrix_rate(torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
    rows = [
        ["stage", "contender", "median s", "range", "ours is faster by", "of the floor", "loss"]
    ]
    record: dict[str, Any] = {"arguments": vars(args), "matrix_gflops": round(rate / 1e9, 1)}
    for stage, steps in contenders(args, pairs, runtime).items():
        seconds, losses = measure(steps, args.rounds)
        ours = statistics.median(seconds["ours"])
        for name, times in seconds.items():
            median = statistics.median(times)
            share = ""
            if stage != "rollout":
                floor = needed_flops(stage, pairs, GPT2Config()) / rate
                share = f"{floor / median:.0%}"
            rows.append(
                [
                    stage,
                    name,
                    f"{median:.2f}",
                    f"{min(times):.2f} to {max(times):.2f}",
                    "" if name == "ours" else f"{median / ours:.2f} x",
                    share,
                    "" if stage == "rollout" else f"{losses[name]:.5f}",
                ]
            )
            record[f"{stage}/{name}"] = [round(t, 3) for t in times]
        print(markdown_table([rows[0], *rows[-len(seconds) :]]), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    record |= {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }
    print(f"\n{markdown_table(rows)}\n")
    print(json.dumps(record))
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"peers_{args.dtype}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
