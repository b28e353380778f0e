"""TRL's trainers, one `training_step` each, on the batch that their own collators make.

Their settings are the fastest that run in float32 without a GPU: no gradient checkpointing (their
default), no padding-free or packed batches (those need a flash-attention kernel; DPO's is switched
off in 1.16), no Liger kernels (Triton). A step of theirs computes entropy and accuracy as well,
which cannot be switched off.
"""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models

from benchmarks.contenders import BETA
from benchmarks.measuring import EOS, Pair


def tokenizer_for_trl() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": EOS, "x": 0}, unk_token="x"))
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, bos_token=end
    )


def trl_step(
    kind: str, model: Any, reference: Any, rows: list[dict[str, Any]], dtype: str
) -> Callable[[], float]:
    """Build a trainer around copies, since it changes what it is given; returns its step."""
    texts = {"SFT": ("text",), "DPO": ("prompt", "chosen", "rejected")}
    columns = texts.get(kind, ("chosen", "rejected"))
    config = getattr(trl, f"{kind}Config")(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        bf16=dtype == "bfloat16",
        use_cpu=model.device.type == "cpu",
        gradient_checkpointing=False,
        disable_tqdm=True,
        **({"beta": BETA} if kind == "DPO" else {}),
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=copy.deepcopy(model),
        args=config,
        train_dataset=Dataset.from_list([dict.fromkeys(columns, "x x")]),  # the batch is ours
        processing_class=tokenizer_for_trl(),
        **({"ref_model": copy.deepcopy(reference)} if kind == "DPO" else {}),
    )
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which is not called
    batch = trainer.data_collator(rows)

    def step() -> float:
        return float(trainer.training_step(trainer.model, dict(batch)))

    return step


def trl_rows(stage: str, pairs: list[Pair]) -> list[dict[str, Any]]:
    """The pairs as TRL's collators take them."""
    if stage == "sft":
        samples = [sample for pair in pairs for sample in pair]
        return [
            {
                "input_ids": [*prompt, *response],
                "labels": [-100] * len(prompt) + list(response),
            }
            for prompt, response in samples
        ]
    if stage == "dpo":
        return [
            {
                "prompt_ids": chosen.prompt_ids,
                "chosen_ids": chosen.response_ids,
                "rejected_ids": rejected.response_ids,
            }
            for chosen, rejected in pairs
        ]
    return [
        {
            "chosen_ids": [*chosen.prompt_ids, *chosen.response_ids],
            "rejected_ids": [*rejected.prompt_ids, *rejected.response_ids],
        }
        for chosen, rejected in pairs
    ]
