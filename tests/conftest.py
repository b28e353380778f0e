"""What the tests share: a small GPT-2 and its tokenizer made in memory, and small data on disk."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.batches import Batch, build_batch
from rlhf.templates import prepare_tokenizer
from rlhf.tokens import Sample

torch.set_num_threads(1)  # tiny matrices: threads would cost more than they bring

EOS = "<|endoftext|>"
TEXTS = [
    "The cat sat on the mat. What did the cat see? It saw the response of a dog.",
    "Name a colour. Blue is a colour, and so is green. The instruction was to name one.",
    "Tell me a story about the sea. Once upon a time there was a sea, and it was calm.",
]


def build_base_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's, in which each tag is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "instruction response </", ".</ x.</ y.</"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS
    )


@pytest.fixture(scope="session")
def base_tokenizer() -> PreTrainedTokenizerFast:
    return build_base_tokenizer()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return prepare_tokenizer(build_base_tokenizer())


def build_gpt2(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> GPT2LMHeadModel:
    """Two layers of random weights, larger than usual so that logits differ clearly."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    return build_gpt2(tokenizer)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model folder as the Hub would give it, dropout 0.1 included."""
    path = tmp_path_factory.mktemp("base") / "gpt2-tiny"
    tokenizer = build_base_tokenizer()
    build_gpt2(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def samples() -> list[Sample]:
    """Prompts and responses of different lengths; the last response is cut: no EOS (id 0)."""
    return [
        Sample([11, 12, 13], [21, 22, 0]),
        Sample([14, 15], [23, 0]),
        Sample([16, 17, 18, 19, 20], [24, 25, 26, 27, 28]),
    ]


@pytest.fixture
def batch(samples: list[Sample]) -> Batch:
    return build_batch(samples, pad_id=0)


SUBJECTS = ["cat", "dog", "sea", "colour", "story", "time", "mat", "instruction"]
VERBS = ["Name", "Tell me of", "What is", "Draw", "Describe"]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `.data`: 40 prompts with a good and a bad response each; good ones say please."""
    root = tmp_path_factory.mktemp("data")
    prompts = [f"{verb} the {subject}" for verb in VERBS for subject in SUBJECTS]
    for side, part in (("train", prompts[::2] + prompts[1::4]), ("eval", prompts[3::4])):
        facts = [{"prompt": prompt, "source": "tests", "prompt_id": prompt} for prompt in part]
        scored = [
            {**fact, "response": response, "score": score}
            for fact in facts
            for response, score in ((f"A {fact['prompt'][-3:]}, please.", 9.0), ("No.", 2.0))
        ]
        pairs = [
            {
                **fact,
                "chosen": f"A {fact['prompt'][-3:]}, please.",
                "rejected": "No.",
                "chosen_score": 9.0,
                "rejected_score": 2.0,
            }
            for fact in facts
        ]
        write_jsonl(root / "sft" / f"{side}.jsonl", scored)
        write_jsonl(root / "rm" / f"{side}.jsonl", scored)
        write_jsonl(root / "pref" / f"{side}.jsonl", pairs)
    return root
