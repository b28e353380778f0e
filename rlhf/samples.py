"""SAMPLES: a few prompts and responses, for people to read."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.batches import Room
from rlhf.experience import decode_responses
from rlhf.generation import generate
from rlhf.metrics import Samples
from rlhf.models import model_stop_ids
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling
from rlhf.tokens import Sample, decode_response

NUM_SAMPLES = 3
SAMPLE_TOKENS = 64  # of a response: enough to see how it goes


def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[Sample],
    runtime: Runtime,
    room: Room,
    *,
    max_len: int,
    seed: int,
) -> Samples:
    """Let the policy answer the first held-out prompts, at temperature 1.

    The noise is the same every time, and no other random number changes. A model that is cut up
    between processes answers nothing: each token would gather its weights.
    """
    if runtime.zero_stage:
        return []
    wanted: dict[tuple[int, ...], Sample] = {}
    for sample in heldout:
        wanted.setdefault(tuple(sample.prompt_ids), sample)
    chosen = [*wanted.values()][:NUM_SAMPLES]
    sampling = Sampling(
        do_sampling=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_gen_len=0,
        max_new_tokens=SAMPLE_TOKENS,
        max_len=max_len,
        pad_id=tokenizer.pad_token_id,
        stop_ids=model_stop_ids(model, tokenizer),
        early_end_ids=[],
    )
    prompts, rows = [sample.prompt_ids for sample in chosen], range(len(chosen))
    was_training = model.training
    model.eval()
    with runtime.autocast():
        rollout = generate(
            model, prompts, sampling=sampling, noise_key=(seed, 0), rows=rows, room=room
        )
    model.train(was_training)
    asked, in_data = texts_of(tokenizer, chosen)
    written = decode_responses(tokenizer, rollout)
    return [
        {"prompt": prompt, "response": response, "in the data": other}
        for prompt, response, other in zip(asked, written, in_data, strict=True)
    ]


def texts_of(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
) -> tuple[list[str], list[str]]:
    """Give the first prompts, as a model reads them with all that stands around, and responses."""
    some = samples[:NUM_SAMPLES]
    prompts = [
        str(tokenizer.decode(sample.prompt_ids, clean_up_tokenization_spaces=False))
        for sample in some
    ]
    return prompts, [decode_response(tokenizer, sample.response_ids) for sample in some]


def judged_samples(
    prompts: Sequence[str],
    responses: Sequence[str],
    **numbers: Tensor,  # (B,) each: what was found of them
) -> Samples:
    """Give the first responses with what was found of each.

    >>> judged_samples(["Name a colour."], ["Blue."], score=Tensor([4.5]))
    [{'prompt': 'Name a colour.', 'response': 'Blue.', 'score': 4.5}]
    """
    shown = [*zip(prompts, responses, strict=True)][:NUM_SAMPLES]
    return [
        {
            "prompt": prompt,
            "response": response,
            **{name: float(values[row]) for name, values in numbers.items()},
        }
        for row, (prompt, response) in enumerate(shown)
    ]
