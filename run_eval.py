"""Evaluation: which checkpoint answers better, how sure that is, and at what KL.

Every checkpoint answers the same prompts, and judges compare each with the first: a reward model or
text classifier, a Python function, a language model behind an OpenAI-compatible endpoint, or
several of them. Writes into `.model/eval`:

    outputs/NAME.json    the responses in AlpacaEval's form: instruction, output, generator
    eval.json            every figure, and every score and verdict
    report.md, .html     tables, pictures, samples side by side; the page needs nothing else
    verdicts.jsonl       what a language model was asked and said: a rerun asks nothing twice

Win rates come with 95% intervals; A against A gives 50%. The KL is from the first checkpoint, an
estimate from the responses themselves. The default sampling is that of run_ppo.py: with prompts,
lengths and reward model of a PPO run its own `eval_kl` comes out, and its `eval_scores` but for the
penalty for a missing EOS.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf.actors import Actors, build_sampling
from rlhf.answers import Answers, about, score_answers, write_answers
from rlhf.arguments import (
    Parser,
    add_boolean,
    count,
    named_path,
    nonempty,
    number,
    positive,
    positive_count,
    seed,
)
from rlhf.batches import Room
from rlhf.cautions import cautions
from rlhf.checkpoints import full_disk, git_commit, require_undamaged
from rlhf.disk import (
    Lock,
    hidden,
    remove,
    replace_json,
    replace_text,
    sha256_of,
    without_nan,
)
from rlhf.endpoints import find_endpoint, shown_url
from rlhf.errors import InputError, run_script
from rlhf.judges import Judged, Pair, judge_pairs
from rlhf.lineage import Run
from rlhf.markdown import markdown_table
from rlhf.memory import fit
from rlhf.metrics import say
from rlhf.models import LANGUAGE_MODEL, load_policy, load_tokenizer
from rlhf.processes import num_processes
from rlhf.prompts import Prompts, read_prompts
from rlhf.records import Prompt, prompt_text
from rlhf.report import html_report, markdown_report, notes, tables
from rlhf.rewards import Scorer, score_by_function
from rlhf.runtime import Runtime, start_runtime
from rlhf.scorers import load_judge, read_judge
from rlhf.standings import by_scores, by_verdicts
from rlhf.tokens import count_dropped, encode_prompts, has_room, same_tokenizer

FLAG = "--model_path"
PROBE = [("What is 1 + 1?", "2", "3")]  # asked before any model answers


def build_parser() -> Parser:
    parser = Parser("Compare checkpoints: their responses to the same prompts, and who is better.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of sampling and of the intervals")
    help = "a checkpoint and its name; the first is the reference (repeatable)"
    add(FLAG, type=named_path, action="append", required=True, metavar="NAME=PATH", help=help)
    help = "file of prompts: rows of .data, or of AlpacaEval"
    add("--prompts", type=nonempty, default=".data/pref/eval.jsonl", help=help)
    add("--max_prompts", type=count, default=805, help="prompts to use (0 = all)")
    add("--out_dir", type=nonempty, default=".model/eval", help="folder for report and responses")
    add("--rm_model_path", type=nonempty, help="judge: reward model or text classifier")
    help = "which label's logit is the score, of a text classifier: its name or number"
    add("--reward_label", type=nonempty, help=help)
    add("--reward_fn", type=nonempty, help="judge: file.py:function or module:function")
    help = "judge: a language model at OPENAI_BASE_URL, with OPENAI_API_KEY"
    add("--judge_model", type=nonempty, help=help)
    add("--judge_timeout", type=positive, default=60.0, help="seconds to wait for a verdict")
    add("--judge_retries", type=count, default=5, help="times to ask again before it is skipped")
    add("--judge_workers", type=positive_count, default=16, help="questions at a time")
    add("--gpu_id", type=count, default=0, help="which CUDA device")
    dtypes = ("auto", "float32", "bfloat16")
    help = "precision of the matrix products (auto: bfloat16 on CUDA)"
    add("--dtype", choices=dtypes, default="auto", help=help)
    add("--max_len", type=positive_count, default=1024, help="tokens of prompt and response")
    add("--max_new_tokens", type=count, default=256, help="cap on a response (0 = up to max_len)")
    add("--min_gen_len", type=count, default=1, help="tokens before a response may end")
    names = ("--do_sampling", "--do_sample")
    add_boolean(parser, *names, default=True, help="sample (false: decode greedily)")
    add("--temperature", type=positive, default=0.2, help="divides the logits")
    add("--top_k", type=count, default=50, help="sample from the likeliest so many (0 = all)")
    add("--top_p", type=number(float, above=0, most=1), default=1.0, help="share of mass kept")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.model_path = dict(args.model_path)  # of two paths for one name, the last counts
    for name in args.model_path:
        if not re.fullmatch(r"\w[\w .+-]{0,99}", name):
            parser.error(
                f"{FLAG}={name}=...: a name is a file's too: up to 100 of letters, digits, _.+-"
            )
    if args.judge_model and len(args.model_path) < 2:
        parser.error(f"--judge_model={args.judge_model} compares: give {FLAG} twice or more")
    if args.reward_label is not None and not args.rm_model_path:
        parser.error(f"--reward_label={args.reward_label} needs a text classifier: --rm_model_path")
    for name in ("judge_timeout", "judge_retries", "judge_workers"):
        value = getattr(args, name)
        if not args.judge_model and value != parser.get_default(name):
            parser.error(f"--{name}={value:g} needs --judge_model: add it, or leave --{name} out")
    if 0 < args.max_new_tokens < args.min_gen_len:
        limits = f"--max_new_tokens={args.max_new_tokens} is less than --min_gen_len"
        parser.error(f"{limits}={args.min_gen_len}: no response could end")
    return args


def main(args: argparse.Namespace) -> None:
    runtime = start_runtime(args.gpu_id, dtype=args.dtype, seed=args.seed, report_to="none")
    if num_processes() > 1:
        raise InputError("run_eval.py works in one process; start it without a launcher")
    say(runtime.notice)
    out_dir = Path(args.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"--out_dir={out_dir} is a file; give a folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = Lock(out_dir, flag="--out_dir")
    except OSError as error:
        raise full_disk(out_dir, error) from error
    with lock:
        evaluate(args, runtime, out_dir)


def evaluate(args: argparse.Namespace, runtime: Runtime, out_dir: Path) -> None:
    # Whatever may be wrong is found before anything is written or paid for.
    runs = [Run(name, path, f"{FLAG}={name}") for name, path in args.model_path.items()]
    for run in runs:
        require_undamaged(run.path, flag=run.flag)
    if args.rm_model_path:
        require_undamaged(args.rm_model_path, flag="--rm_model_path")
    load = partial(load_tokenizer, kind=LANGUAGE_MODEL, max_len=args.max_len)
    tokenizers = {run.name: load(run.path, flag=run.flag) for run in runs}
    prompts, asked = prepare_prompts(args, tokenizers)
    texts = [prompt_text(prompt) for prompt in prompts]
    scorers = prepare_scorers(args, tokenizers, runtime)
    verdicts = partial(ask, args, out_dir / "verdicts.jsonl")
    if args.judge_model:
        verdicts(PROBE)

    answers = write_all(args, runs, tokenizers, asked, runtime)
    responses = {name: written.texts for name, written in answers.items()}
    judges = []
    for kind, told, load_scorer in scorers:
        scores = score_answers(load_scorer(), texts, answers, runtime.device)
        judges.append(by_scores(kind, told, scores, responses, seed=args.seed))
    if args.judge_model:
        judges.append(judge_all(args, prompts, responses, verdicts))

    digest = sha256_of(Path(args.prompts))
    record = {
        "reference": runs[0].name,
        "how": how(args, len(prompts)),
        "notes": cautions(
            runs,
            judges,
            prompts_sha256=digest,
            num_prompts=len(prompts),
            rm_path=args.rm_model_path,
            reward_fn=args.reward_fn,
        ),
        "arguments": vars(args),
        "prompts_sha256": digest,
        "models": {run.name: about(run, answers[run.name], seed=args.seed) for run in runs},
        "judges": judges,
        "git_commit": git_commit(),
    }
    record = without_nan(record)  # as the file has it
    write_files(out_dir, record, texts, responses, runs)
    for heading, rows in tables(record).items():
        say(f"\n{heading}\n\n{markdown_table(rows)}")
    say("\n" + "\n".join(notes(record)))
    say(f"\nreport: {out_dir / 'report.html'}, a page with pictures and samples")


def write_files(
    out_dir: Path,
    record: Mapping[str, Any],
    prompts: Sequence[str],
    responses: Mapping[str, Sequence[str]],
    runs: list[Run],
) -> None:
    """Write the responses in AlpacaEval's form, all figures, and what people read.

    They take the place of an earlier evaluation's together, once all of them are on the disk.
    """
    new = hidden(out_dir / "evaluation")
    shutil.rmtree(new, ignore_errors=True)
    try:
        for name, texts in responses.items():
            pairs = zip(prompts, texts, strict=True)
            rows = [{"instruction": x, "output": y, "generator": name} for x, y in pairs]
            replace_json(new / "outputs" / f"{name}.json", rows)
        replace_json(new / "eval.json", record)
        replace_text(new / "report.md", markdown_report(record, prompts, responses))
        replace_text(new / "report.html", html_report(record, prompts, responses, runs))
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise full_disk(out_dir, error) from error
    if (out_dir / "outputs").exists():
        remove(out_dir / "outputs")
    for path in new.iterdir():
        path.replace(out_dir / path.name)
    new.rmdir()


def prepare_prompts(
    args: argparse.Namespace, tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> tuple[list[Prompt], dict[str, Prompts]]:
    """Read the prompts that leave room for a response, whoever answers."""
    prompts = read_prompts(args.prompts, args.max_prompts, flag="--prompts")
    ids = {name: encode_prompts(tokenizer, prompts) for name, tokenizer in tokenizers.items()}
    limits = {"max_len": args.max_len, "min_len": args.min_gen_len}
    kept = [
        row for row in range(len(prompts)) if all(has_room(x[row], **limits) for x in ids.values())
    ]
    say(count_dropped(len(kept), len(prompts), side=Path(args.prompts).stem, **limits))
    prompts = [prompts[row] for row in kept]
    texts = [prompt_text(prompt) for prompt in prompts]
    return prompts, {name: Prompts([x[row] for row in kept], texts) for name, x in ids.items()}


def prepare_scorers(
    args: argparse.Namespace,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    runtime: Runtime,
) -> list[tuple[str, str, Callable[[], Scorer]]]:
    """Check the judges that score; returns what a score is called, the judge, and what loads it."""
    scorers: list[tuple[str, str, Callable[[], Scorer]]] = []
    if args.rm_model_path:
        path, known = args.rm_model_path, None
        for tokenizer in tokenizers.values():
            known = read_judge(
                path,
                tokenizer,
                max_len=args.max_len,
                max_reward=None,
                label=args.reward_label,
                needs_spread=False,
                shared_with=None,
            )
        pad_id = next(iter(tokenizers.values())).pad_token_id
        options = {"max_len": args.max_len, "pad_id": pad_id, "runtime": runtime}
        load = partial(load_judge, known, path, trunk=None, **options)
        scorers.append(("reward", f"the reward model {path}", load))
    if args.reward_fn:
        score = score_by_function(args.reward_fn)
        scorers.append((args.reward_fn.rpartition(":")[2], args.reward_fn, lambda: score))
    return scorers


def write_all(
    args: argparse.Namespace,
    runs: Sequence[Run],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    asked: Mapping[str, Prompts],
    runtime: Runtime,
) -> dict[str, Answers]:
    """Let every checkpoint answer, with the same noise; no more than two are in memory."""
    first = runs[0]
    load = partial(load_policy, device=runtime.device)
    reference = load(first.path, flag=first.flag).requires_grad_(False)

    def answer(run: Run) -> Answers:
        started, tokenizer = time.monotonic(), tokenizers[run.name]
        policy = reference if run == first else load(run.path, flag=run.flag).requires_grad_(False)
        has_kl = same_tokenizer(tokenizers[first.name], tokenizer)
        sampling = build_sampling(vars(args), tokenizer, policy)
        actors = Actors(policy, reference if has_kl else None, None, sampling, runtime)
        attempt = partial(write_answers, actors, tokenizer, asked[run.name], args.seed)
        written, _ = fit(attempt, Room(0), runtime.device)
        say(f"{run.name}: {run.path} has answered, {time.monotonic() - started:.0f} s")
        return written

    return {run.name: answer(run) for run in runs}


def ask(args: argparse.Namespace, cache: Path, pairs: Sequence[Pair]) -> Judged:
    """Let a language model compare pairs, in both orders."""
    with tqdm(leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return judge_pairs(
            pairs,
            model=args.judge_model,
            cache=cache,
            timeout=args.judge_timeout,
            max_retries=args.judge_retries,
            num_workers=args.judge_workers,
            progress=show,
        )


def judge_all(
    args: argparse.Namespace,
    prompts: list[Prompt],
    responses: Mapping[str, list[str]],
    verdicts: Callable[[Sequence[Pair]], Judged],
) -> dict[str, Any]:
    """Let a language model compare every checkpoint with the first."""
    (_, reference), *others = responses.items()
    judged = {}
    for name, texts in others:
        say(f"{name}: asking {args.judge_model}")
        judged[name] = verdicts(list(zip(prompts, texts, reference, strict=True)))
        told = f"{judged[name].num_asked} verdicts asked for, {judged[name].num_kept} known before"
        say(f"{name}: {told}")
    judge = f"{args.judge_model} at {shown_url(find_endpoint())}"
    return by_verdicts(judge, judged, responses, seed=args.seed)


def how(args: argparse.Namespace, num_prompts: int) -> str:
    """Say how the responses were made."""
    drawn = f"temperature {args.temperature:g}"
    drawn += f", top-k {args.top_k}" if args.top_k else ""
    drawn += f", top-p {args.top_p:g}" if args.top_p < 1 else ""
    drawn = drawn if args.do_sampling else "greedy"
    most = args.max_new_tokens or args.max_len
    asked = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
    told = f"{asked} of {args.prompts}, one response each: {drawn}, at most {most} tokens."
    if not args.do_sampling:
        return f"{told} Greedy responses have no KL."
    return f"{told} The KL is at this temperature too: at a lower one, policies differ less."


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
