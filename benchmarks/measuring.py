"""What the benchmarks share: their data, their clock, the machine's limits, and the record."""

import argparse
import ctypes
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config

from rlhf.batches import sample_length
from rlhf.markdown import markdown_table
from rlhf.runtime import Runtime, keep_freed_memory, start_runtime
from rlhf.tokens import Sample

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
EOS = 50256
SHAPES = {  # layers, width, heads
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
Step = Callable[[], Any]
Pair = tuple[Sample, Sample]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark takes."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--max_len", type=int, default=256, help="tokens of prompt and response")
    parser.add_argument("--quick", action="store_true", help="less of everything")


def start(args: argparse.Namespace) -> Runtime:
    return start_runtime(0, dtype=args.dtype, seed=0, report_to="none")


def gpt2_config(shape: str = "gpt2") -> GPT2Config:
    layers, width, heads = SHAPES[shape]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"n_layer": layers, "n_embd": width, "n_head": heads}
    return GPT2Config(**size, **dropout, pad_token_id=EOS)


def draw_pairs(count: int, max_len: int, seed: int = 0) -> list[Pair]:
    """Pairs of random ids with lengths like UltraFeedback's, cut at `max_len`.

    The medians are 82 tokens of prompt, 215 of the better and 192 of the worse response.
    """
    rng, ids, pairs = random.Random(seed), range(1000, 50000), []
    for _ in range(count):
        prompt = rng.choices(ids, k=min(int(rng.lognormvariate(4.4, 1)), max_len - 8))
        lengths = [max(4, int(rng.lognormvariate(mu, 0.9))) for mu in (5.37, 5.26)]
        chosen, rejected = (
            rng.choices(ids, k=min(length, max_len - len(prompt))) for length in lengths
        )
        pairs.append((Sample(prompt, chosen), Sample(prompt, rejected)))
    return pairs


def needed_flops(
    stage: str, samples: Iterable[Sample], config: GPT2Config, *, passes: int = 6
) -> float:
    """FLOPs of the matrix products that a stage needs: 2 a weight forwards, 4 backwards.

    Real tokens only, the vocabulary at response positions only, attention's causal half.
    """
    trunk = 12 * config.n_layer * config.n_embd**2
    head = config.vocab_size * config.n_embd * (stage != "rm")
    flops = 0.0
    for sample in samples:
        length = sample_length(sample)
        attention = config.n_layer * config.n_embd * length
        flops += passes * (length * (trunk + attention) + len(sample.response_ids) * head)
    return flops


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Step, device: torch.device) -> tuple[float, Any]:
    wait(device)
    start = time.perf_counter()
    result = step()
    wait(device)
    return time.perf_counter() - start, result


def matrix_rate(dtype: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device)[0] for _ in range(10))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, the best of several."""
    a = torch.ones(2**28, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device)[0] for _ in range(5))


def release_memory() -> None:
    """Give what is free back to the system, which the C library would keep for the next step."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def returning_memory(step: Step) -> Step:
    """Let a step run with the C library's own way, which `start` has changed for the process."""

    def run() -> Any:
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
        libc.mallopt(m_mmap_max, 65536)
        libc.mallopt(m_mmap_threshold, 2**25)  # where the default ends up, which adapts
        libc.mallopt(m_trim_threshold, 2**26)
        try:
            return step()
        finally:
            keep_freed_memory()

    return run


def take_turns(
    steps: dict[str, Step], rounds: int, device: torch.device, *, releasing: bool = False
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Let all take turns, once to warm up; seconds of each round, and the last result of each.

    With `releasing`, what a step leaves free goes back to the system before the next one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, Any] = {}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            elapsed, results[name] = timed(step, device)
            if releasing:
                release_memory()
            if turn:
                seconds[name].append(elapsed)
    return seconds, results


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def facts(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed_files": git("status", "--porcelain", "--", "*.py"),
    }


def report(name: str, rows: list[list[str]], record: dict[str, Any], device: torch.device) -> None:
    """Print the table and the record, and keep the record."""
    record = {"command": " ".join(sys.argv), **record, **facts(device)}
    print(f"\n{markdown_table(rows)}\n\n{json.dumps(record)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
