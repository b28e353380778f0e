"""ANSWERS: what checkpoints write to the same prompts, as texts and as ids."""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf.actors import Actors
from rlhf.batches import Batch, Room
from rlhf.checkpoints import content_of, named_checkpoint
from rlhf.evaluation import distinct
from rlhf.experience import decode_responses, roll_out, token_numbers
from rlhf.lineage import Run
from rlhf.memory import fit
from rlhf.prompts import Prompts
from rlhf.rewards import Scorer
from rlhf.winrates import paired_bootstrap

AT_ONCE = 64  # prompts that are answered together: memory only


class Answers(NamedTuple):
    """What one checkpoint wrote, to N prompts."""

    texts: list[str]
    batches: list[Batch]  # the same as ids, AT_ONCE at a time
    ended: Tensor  # (N,) bool: by itself
    tokens: Tensor  # (N,)
    kl: Tensor | None  # (N,) nats; None: decoded greedily, or the first has another tokenizer


@torch.no_grad()
def write_answers(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    seed: int,
    room: Room,
) -> Answers:
    """Write a response to each prompt, with the noise of a run of PPO that evaluates itself."""
    texts, batches, ended, kl = [], [], [], []
    starts = range(0, len(prompts.ids), AT_ONCE)
    for start in tqdm(starts, leave=False, disable=not sys.stderr.isatty()):
        rows = range(len(prompts.ids))[start : start + AT_ONCE]
        rollout = roll_out(actors, prompts.select(rows).ids, rows, (seed, 0), room)
        texts += decode_responses(tokenizer, rollout)
        batches.append(rollout.batch)
        ended.append(rollout.ended)
        if actors.ref_policy is not None and actors.sampling.do_sampling:
            kl.append(token_numbers(actors, rollout, room).kl.sum(dim=1))  # (B,)
    tokens = [batch.response_mask.sum(dim=1) for batch in batches]  # (B,) each
    all_kl = torch.cat(kl) if kl else None
    return Answers(texts, batches, torch.cat(ended), torch.cat(tokens), all_kl)


@torch.no_grad()
def score_answers(
    score: Scorer, prompts: list[str], answers: Mapping[str, Answers], device: torch.device
) -> dict[str, np.ndarray]:
    """Score every response: (N,) for each checkpoint."""

    def attempt(written: Answers, room: Room) -> np.ndarray:
        scores, start = [], 0
        for batch in written.batches:
            part = slice(start, start + len(batch.response_ids))
            texts = prompts[part], written.texts[part]
            scores.append(score(*texts, batch, written.ended[part], room))
            start = part.stop
        return torch.cat(scores).cpu().numpy().astype(np.float64)

    return {
        name: fit(partial(attempt, written), Room(0), device)[0]
        for name, written in answers.items()
    }


def about(run: Run, written: Answers, *, seed: int) -> dict[str, Any]:
    """Tell which checkpoint it was, and what it wrote."""
    kl = None if written.kl is None else paired_bootstrap(written.kl.cpu().numpy(), seed=seed)
    return {
        "path": named_checkpoint(run.path),
        "sha256": content_of(run.path),
        "kl": kl,
        "tokens": paired_bootstrap(written.tokens.cpu().numpy(), seed=seed),
        "eos_rate": float(written.ended.float().mean()),
        "distinct_1": distinct(written.texts, 1),
        "distinct_2": distinct(written.texts, 2),
    }
