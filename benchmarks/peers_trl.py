"""TRL's trainers, one `training_step` each, on the batch that their own collators make.

Their settings are the fastest that run in float32 without a GPU: no gradient checkpointing, which
is their default, no padding-free or packed batches (those need a flash-attention kernel; DPO's is
switched off in 1.16), no Liger kernels (Triton). A step of theirs computes entropy and accuracy as
well, which cannot be switched off.
"""

import copy
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models

from benchmarks.contenders import BETA
from benchmarks.measuring import EOS


def tokenizer_for_trl() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": EOS, "x": 0}, unk_token="x"))
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, bos_token=end
    )


KINDS = {"sft": "SFT", "dpo": "DPO", "rm": "Reward"}
COLUMNS = {"sft": ["text"], "dpo": ["prompt", "chosen", "rejected"], "rm": ["chosen", "rejected"]}


def build_trainer(
    kind: str,
    model: Any,
    columns: list[str],
    *,
    module: str = "trl",
    settings: dict[str, Any],
    **parts: Any,
) -> Any:
    """Build a trainer of TRL, which changes what it is given; its data set is not used."""
    home = importlib.import_module(module)
    config = getattr(home, f"{kind}Config")(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=model.device.type == "cpu",
        disable_tqdm=True,
        **{"bf16": False, "gradient_checkpointing": False, **settings},  # theirs: on
    )
    return getattr(home, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([dict.fromkeys(columns, "x x")]),
        processing_class=tokenizer_for_trl(),
        **parts,
    )


def trl_step(
    stage: str, model: Any, reference: Any, dtype: str, *, checkpointing: bool = False
) -> Callable[[list[Any]], float]:
    """Build a trainer around copies, and return its step."""
    is_dpo = stage == "dpo"
    trainer = build_trainer(
        KINDS[stage],
        copy.deepcopy(model),
        COLUMNS[stage],
        settings={
            "bf16": dtype == "bfloat16",
            "gradient_checkpointing": checkpointing,
            **({"beta": BETA} if is_dpo else {}),
        },
        **({"ref_model": copy.deepcopy(reference)} if is_dpo else {}),
    )
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which is not called

    def step(batch: list[Any]) -> float:
        columns = trainer.data_collator([trl_row(row) for row in batch])
        return float(trainer.training_step(trainer.model, columns))

    def trl_row(row: Any) -> dict[str, list[int]]:
        if stage == "sft":
            prompt, response = row
            return {"input_ids": [*prompt, *response], "labels": [-100] * len(prompt) + response}
        chosen, rejected = row
        if stage == "dpo":
            return {
                "prompt_ids": chosen.prompt_ids,
                "chosen_ids": chosen.response_ids,
                "rejected_ids": rejected.response_ids,
            }
        return {
            "chosen_ids": [*chosen.prompt_ids, *chosen.response_ids],
            "rejected_ids": [*rejected.prompt_ids, *rejected.response_ids],
        }

    return step
