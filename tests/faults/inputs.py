"""Records, texts and command lines as nobody should write them."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from transformers import AutoTokenizer

import load_dataset
from rlhf.errors import InputError
from rlhf.records import PAIR, SCORED, read_split
from rlhf.templates import prepare_tokenizer
from rlhf.tokens import encode_samples
from tests.faults.world import SCRIPTS, World

# Rows: JSON of any shape, and the known forms with anything in their fields


def strange_values() -> st.SearchStrategy:
    texts = st.text(st.characters(codec=None), max_size=30) | st.sampled_from(
        ["", " ", "\x00", "\ud800", "<response>", "</response>", "<|endoftext|>", "é" * 20_000]
    )
    numbers = st.integers() | st.floats(allow_nan=True) | st.just(10**400)
    scalars = st.none() | st.booleans() | numbers | texts
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=8,
    )


def rows() -> st.SearchStrategy:
    anything = strange_values()
    score = st.floats(-1, 12) | st.sampled_from(["7", "N/A", None]) | anything
    text = st.text(min_size=1, max_size=40) | anything
    completion = st.fixed_dictionaries({"response": text, "overall_score": score}) | anything
    ultrafeedback = st.fixed_dictionaries(
        {"instruction": text, "completions": st.lists(completion, max_size=5)},
        optional={"source": text},
    )
    turns = st.lists(st.fixed_dictionaries({"role": text, "content": text}), max_size=4)
    pair = st.fixed_dictionaries({"chosen": text | turns, "rejected": text | turns})
    return ultrafeedback | pair | anything


def good_rows() -> list[dict]:
    """Enough usable rows for every split to have both its sides."""
    completions = [
        {"response": "Yes.", "overall_score": 8},
        {"response": "No.", "overall_score": 2},
    ]
    return [{"instruction": f"Is {i} a number?", "completions": completions} for i in range(60)]


def fuzz(root: Path, number: int, seed: int = 0) -> Counter:
    """Load so many strange rows; count tracebacks, invalid rows that got in, and lost accounts."""
    counts: Counter[str] = Counter()
    size = 10  # more would be more than hypothesis draws at once
    source, data_dir = root / "fuzzed.jsonl", root / "fuzzed"

    @seeded(seed)
    @settings(
        max_examples=max(1, number // size),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(rows(), min_size=size, max_size=size))
    def load(strange: list) -> None:
        lines = [json.dumps(row) for row in (*good_rows(), *strange)]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        shutil.rmtree(data_dir, ignore_errors=True)
        counts["rows"] += len(strange)
        try:
            options = [f"--dataset={source}", f"--data_dir={data_dir}", "--language=any"]
            load_dataset.main(load_dataset.parse_args(options))
        except Exception as error:
            counts["tracebacks"] += 1
            print(f"{type(error).__name__}: {error}")
            return
        manifest = json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))
        for name in ("rows", "prompts", "responses"):
            told = manifest[name]
            balanced = told["read"] == told["kept"] + sum(told["dropped"].values())
            counts["unbalanced"] += not balanced
        counts["unbalanced"] += manifest["rows"]["read"] != len(lines)
        for split, schema in (("sft", SCORED), ("rm", SCORED), ("pref", PAIR)):
            for side in ("train", "eval"):
                try:
                    read_split(data_dir / split, side, schema)
                except InputError as error:
                    counts["invalid rows"] += 1
                    print(error)

    load()
    return counts


# Texts that pretend to be more than text


def inject(world: World, number: int, seed: int = 0) -> Counter:
    """Tokenise so many texts made of special tokens and tags; count EOS ids that they became."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(f"{world.root}/world/gpt2-toy"))
    eos = tokenizer.eos_token
    parts = [eos, eos[:-1], eos[1:], "<response>", "</response>", "<instruction>", "</", "<", "|>"]
    parts += [" ", "\n", "name", "say", "​", "\ufeff", "é", "\x00", eos.upper(), eos * 2]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(2 * number)]
    prompts, responses = texts[:number], texts[number:]
    samples = encode_samples(tokenizer, prompts, responses, max_len=400, min_len=0, data_dir=None)
    for sample in samples:
        assert sample is not None
        ids = [*sample.prompt_ids, *sample.response_ids]
        counts["texts"] += 1
        counts["EOS from text"] += tokenizer.eos_token_id in ids[:-1] or ids[-1] != ids[-1]
    return counts


# Commands


def bad_commands(world: World) -> Iterator[tuple[str, list[str]]]:
    """Stages and what to add to their command, to be refused."""
    root = world.root
    damaged, code = root / "damaged", root / "code"
    shutil.copytree(world.whole("sft") / "best", damaged, dirs_exist_ok=True)
    (damaged / "config.json").write_text("{}")
    shutil.copytree(f"{root}/world/gpt2-toy", code, dirs_exist_ok=True)
    config = json.loads((code / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (code / "config.json").write_text(json.dumps(config))
    (code / "mine.py").write_text(f"open('{root}/executed', 'w')\n")
    pickled = root / "pickled"
    shutil.copytree(f"{root}/world/gpt2-toy", pickled, dirs_exist_ok=True)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    lines = (root / "data/sft/train.jsonl").read_text().splitlines()
    for name, data in {
        "truncated": "\n".join([*lines[:3], lines[3][:20]]).encode(),
        "latin1": lines[0].encode() + b'\n{"prompt": "caf\xe9"}\n',
        "typed": json.dumps({**json.loads(lines[0]), "score": "nine"}).encode(),
        "nan": lines[0].replace('"score": ', '"score": NaN, "x": ').encode(),
        "scale": json.dumps({**json.loads(lines[0]), "score": 99.0}).encode(),
        "surrogate": json.dumps({**json.loads(lines[0]), "response": "\ud800"}).encode(),
        "control": b"\x00\x01\x02",
        "list": b"[1, 2, 3]",
        "empty": b"",
    }.items():
        (root / "bad" / name).mkdir(parents=True, exist_ok=True)
        (root / "bad" / name / "train.jsonl").write_bytes(data)
        (root / "bad" / name / "eval.jsonl").write_bytes("\n".join(lines).encode())
        yield "sft", [f"--data_dir={root}/bad/{name}"]
    file = root / "file"
    file.touch()
    for path in (
        damaged,
        code,
        pickled,
        file,
        root,
        "./nowhere",
        "../..",
        "a/b/c",
        "x=y",
        " ",
        "/",
    ):
        yield "sft", [f"--model_id={path}"]
    for path in (damaged, f"{root}/whole/rm/best", f"{root}/whole/sft", "REQUIRED", "a b"):
        yield "rm", [f"--sft_model_path={path}"]
        yield "dpo", [f"--sft_model_path={path}"]
    for path in (damaged, f"{root}/whole/sft/best"):
        yield "ppo", [f"--rm_model_path={path}"]
    for name in ("learning_rate", "batch_size", "num_epochs", "max_len", "save_every"):
        for value in ("0", "-1", "nan", "abc", ""):
            yield "sft", [f"--{name}={value}"]
    for name in ("temperature", "top_p", "gamma", "epsilon", "beta", "max_new_tokens"):
        yield "ppo", [f"--{name}=-0.5"]
    yield "ppo", ["--max_reward=9"]
    yield "ppo", ["--reward_fn=nowhere.py:score"]
    yield "sft", ["--unknown"]
    yield "sft", [f"--ckpt_dir={file}"]
    yield "sft", [f"--ckpt_dir={root}/world"]
    yield "sft", ["--resume=must"]
    yield "dpo", ["--max_len=4096"]


def misuse(world: World) -> Counter:
    """Start every such command; count those that do not end in one line with exit code 2."""
    counts: Counter[str] = Counter()
    for stage, options in bad_commands(world):
        script = SCRIPTS[stage]
        argv = world.arguments(stage, world.root / "refused", *options)

        def refuse_models(script=script, argv=argv) -> None:
            import rlhf.models

            args = script.parse_args(argv)
            real = rlhf.models.load_weights
            if "pickled" not in str(options):  # noqa: B023  that is seen by loading
                rlhf.models.load_weights = lambda *a: print("MODEL LOADED") or real(*a)
            script.main(args)

        code = world.finish(refuse_models)
        told = [line for line in world.told().splitlines() if "error: " in line]
        is_right = code == 2 and len(told) == 1 and "Traceback" not in world.told()
        counts["bad inputs"] += 1
        counts["tracebacks"] += "Traceback" in world.told()
        counts["not one line"] += not is_right
        counts["models loaded"] += "MODEL LOADED" in world.told()
        if not is_right or "MODEL LOADED" in world.told():
            print(f"{stage} {options}: exit {code}: {world.told()[-400:]}")
    counts["code executed"] = int((world.root / "executed").exists())
    return counts
