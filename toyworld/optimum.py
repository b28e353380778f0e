"""The best possible policy, computed: every response of the world is enumerated.

A response has at most four tokens, so all of them are the leaves of a small prefix tree. With the
probability of every leaf under policy and reference, and its reward, nothing is left to estimate:

    J(pi)   = E_pi[r] - beta * KL(pi || ref)
    pi*     = ref * exp(r / beta) / Z,  over what may be sampled
    J(pi*)  = beta * log Z
    share   = (J(pi) - J(start)) / (J(pi*) - J(start))
            = 1 - KL(pi || pi*) / KL(start || pi*)

`start` is the reference as it is sampled: `min_gen_len` forbids it to end at once, which costs it a
little KL. Everything is in float64, nothing is pruned, and so no mass is left out.
"""

import copy
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from toyworld.world import EOS, MAX_RESPONSE_TOKENS, MEANINGS, NAMES, TAGS, VOCABULARY, gold_reward

CLOSING_TAG = TAGS[-1]


class Tree(NamedTuple):
    """The leaves of all responses of at most `depth` tokens, in one fixed order.

    First come the responses that end with EOS, from the shortest on, then those of `depth` tokens
    that do not end.
    """

    words: Sequence[str]  # the vocabulary, by id
    depth: int

    @property
    def going_on(self) -> list[int]:
        """Ids that do not end a response."""
        return [i for i, word in enumerate(self.words) if word != EOS]

    def texts(self) -> list[str]:
        """Each leaf as the text that people see: without EOS and one closing tag."""
        prefixes: list[list[str]] = [[]]
        ended: list[list[str]] = []
        for _ in range(self.depth):
            ended += prefixes
            prefixes = [[*p, self.words[i]] for p in prefixes for i in self.going_on]
        leaves = (p[:-1] if p[-1:] == [CLOSING_TAG] else p for p in [*ended, *prefixes])
        return [" ".join(leaf) for leaf in leaves]

    def num_ended(self) -> int:
        """Count the leaves that end with EOS."""
        return sum(len(self.going_on) ** length for length in range(self.depth))


TREE = Tree(VOCABULARY, MAX_RESPONSE_TOKENS)


@torch.no_grad()
def leaf_logprobs(
    model: Any, prompt_ids: Sequence[int], tree: Tree, *, temperature: float, min_gen_len: int
) -> Tensor:  # (N,) float64
    """Log-probability of every leaf, one forward of all prefixes of a length at a time.

    The first `min_gen_len` tokens can be neither EOS nor the closing tag; the others share the
    mass. Raises: ValueError if the model has other words than the tree.
    """
    if model.config.vocab_size != len(tree.words):
        raise ValueError(f"{model.config.vocab_size} tokens in the model, {len(tree.words)} here")
    eos_id, going_on = tree.words.index(EOS), torch.tensor(tree.going_on)
    early = [i for i, word in enumerate(tree.words) if word in (EOS, CLOSING_TAG)]
    tokens, past = torch.tensor([list(prompt_ids)]), None
    prefix = torch.zeros(1, dtype=torch.float64)  # log-probability of each prefix
    ended = []
    for position in range(tree.depth):
        output = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[:, -1].double() / temperature  # (prefixes, V)
        if position < min_gen_len:
            logits[:, early] = -torch.inf
        logprobs = prefix[:, None] + logits.log_softmax(dim=1)
        ended.append(logprobs[:, eos_id])
        prefix = logprobs[:, going_on].flatten()
        if position + 1 < tree.depth:
            past.batch_repeat_interleave(len(going_on))
            tokens = going_on.repeat(len(logits))[:, None]
    return torch.cat((*ended, prefix))


@cache
def graded_leaves() -> list[tuple[int, str]]:
    """The leaves of the world that any prompt may grade above 1: a phrase, and at most one name."""
    shapes = [(phrase, *name) for phrase in MEANINGS for name in ((), *((n,) for n in NAMES))]
    texts = {" ".join(shape) for shape in shapes}
    return [(leaf, text) for leaf, text in enumerate(TREE.texts()) if text in texts]


def leaf_rewards(prompt: str, *, missing_eos_penalty: float) -> Tensor:  # (N,) float64
    """The reward that PPO maximises, of every leaf: gold, less the penalty for a missing EOS."""
    num_ended = TREE.num_ended()
    num_leaves = num_ended + len(TREE.going_on) ** TREE.depth
    rewards = torch.ones(num_leaves, dtype=torch.float64)
    leaves, texts = zip(*graded_leaves(), strict=True)
    gold = gold_reward([prompt] * len(texts), list(texts))
    rewards[list(leaves)] = torch.tensor(gold, dtype=torch.float64)
    rewards[num_ended:] -= missing_eos_penalty
    return rewards


class Exact(NamedTuple):
    """A policy's exact figures on one prompt, in rewards and nats."""

    reward: float  # E_pi[r]
    kl: float  # KL(pi || ref)
    objective: float  # J(pi)
    start_objective: float  # J(start)
    best_objective: float  # J(pi*)
    best_reward: float
    best_kl: float


def expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """Mean of values under a distribution; a leaf of probability 0 adds nothing."""
    return torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * values).sum()


def exact_figures(
    logprobs: Tensor,  # (N,)  of the policy
    start_logprobs: Tensor,  # (N,)  of the reference as it is sampled: -inf where it may not go
    ref_logprobs: Tensor,  # (N,)  of the reference, over everything
    rewards: Tensor,  # (N,)
    *,
    beta: float,
) -> Exact:
    """Compare a policy with the start and with the optimum.

    Source: Ziegler et al., 1909.08593; 2305.18290, equation 4.

    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> r = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> figures = exact_figures(half, half, half, r, beta=1.0)
    >>> round(figures.best_objective, 4), figures.objective  # log((1 + e) / 2), 1/2
    (0.6201, 0.5)
    """
    weights = torch.where(start_logprobs.isneginf(), -torch.inf, ref_logprobs + rewards / beta)
    log_z = weights.logsumexp(dim=0)
    best = weights - log_z

    def figures(p: Tensor) -> tuple[float, float]:
        return float(expectation(p, rewards)), float(expectation(p, p - ref_logprobs))

    (reward, kl), (start_reward, start_kl) = figures(logprobs), figures(start_logprobs)
    best_reward, best_kl = figures(best)
    return Exact(
        reward=reward,
        kl=kl,
        objective=reward - beta * kl,
        start_objective=start_reward - beta * start_kl,
        best_objective=float(beta * log_z),
        best_reward=best_reward,
        best_kl=best_kl,
    )


def share_of_gain(figures: Sequence[Exact]) -> float:
    """Share of the possible gain over all prompts: a ratio of means, not a mean of ratios."""
    gained = sum(f.objective - f.start_objective for f in figures)
    return gained / sum(f.best_objective - f.start_objective for f in figures)


def exact_results(
    policies: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float,
    beta: float,
    min_gen_len: int,
    missing_eos_penalty: float,
) -> dict[str, list[Exact]]:
    """Compute every policy's figures on every prompt; the first policy is the reference."""
    models = {name: copy.deepcopy(policy).double() for name, policy in policies.items()}
    reference = next(iter(models.values()))
    results: dict[str, list[Exact]] = {name: [] for name in models}
    for prompt in prompts:
        prompt_ids = tokenizer(f"<instruction>{prompt}</instruction><response>")["input_ids"]
        rewards = leaf_rewards(prompt, missing_eos_penalty=missing_eos_penalty)
        leaves = partial(leaf_logprobs, prompt_ids=prompt_ids, tree=TREE, temperature=temperature)
        ref_logprobs = leaves(reference, min_gen_len=0)
        sampled = {name: leaves(model, min_gen_len=min_gen_len) for name, model in models.items()}
        start_logprobs = next(iter(sampled.values()))
        for name, logprobs in sampled.items():
            figures = exact_figures(logprobs, start_logprobs, ref_logprobs, rewards, beta=beta)
            results[name].append(figures)
    return results
