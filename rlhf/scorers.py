"""SCORERS: who scores the responses, as the checkpoint tells: our reward model or another's."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoints import read_run
from rlhf.classifiers import Classifier, load_classifier, read_classifier, score_by_classifier
from rlhf.errors import InputError
from rlhf.metrics import say
from rlhf.models import (
    REWARD_MODEL,
    load_reward_model,
    load_tokenizer,
)
from rlhf.rewards import RewardFacts, Scorer, read_reward_facts, score_by_model
from rlhf.runtime import Runtime
from rlhf.tokens import require_same_tokenizer
from rlhf.trunk import SharedRewardModel, require_shareable

FLAG = "--rm_model_path"


def read_judge(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    max_reward: float | None,  # None: its own
    label: str | None,  # of a text classifier
    needs_spread: bool,  # of its rewards, stored beside it
    shared_with: str | None,  # the SFT model whose trunk it has to share
) -> RewardFacts | Classifier:
    """Check that a reward model fits, before any weights are read.

    What run_rm.py has not trained may be any text classifier. Raises: InputError.
    """
    run = read_run(path, flag=FLAG)
    if run.get("stage") != "rm":
        if needs_spread:
            told = f"--normalize_reward=stored: {FLAG}={path} is not of run_rm.py"
            raise InputError(f"{told} and has no mean and spread stored; give running")
        return read_classifier(path, flag=FLAG, label=label)
    if label is not None:
        told = f"--reward_label={label}: {FLAG}={path} is of run_rm.py"
        raise InputError(f"{told} and has one logit; leave --reward_label out")
    own = load_tokenizer(path, flag=FLAG, kind=REWARD_MODEL, max_len=max_len)
    require_same_tokenizer(tokenizer, own, flag=FLAG)
    if shared_with:
        require_shareable(path, flag=FLAG, sft_path=shared_with)
    return read_reward_facts(run, path=path, max_reward=max_reward)


def load_judge(
    known: RewardFacts | Classifier,
    path: str,
    *,
    trunk: PreTrainedModel | None,  # where it is an adapter on one
    max_len: int,
    pad_id: int,
    runtime: Runtime,
) -> Scorer:
    """Load the model that scores: on its own, or as an adapter on another model's trunk."""
    if isinstance(known, Classifier):
        classifier, judge = load_classifier(known, flag=FLAG, device=runtime.device)
        say(classifier.told(max_len=max_len))
        return score_by_classifier(classifier, judge, runtime=runtime)
    model: Any
    if trunk is not None:
        model = SharedRewardModel(trunk, path, flag=FLAG)
    else:
        model = load_reward_model(path, flag=FLAG, device=runtime.device, pad_id=pad_id)
    return score_by_model(model, known, runtime=runtime)
