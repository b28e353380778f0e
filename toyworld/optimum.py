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
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import InputError
from toyworld.best_of import best_of_n
from toyworld.world import EOS, MEANINGS, NAMES, TAGS, VOCABULARY, gold_reward

CLOSING_TAG = TAGS[-1]
MAX_LEAVES = 1_000_000  # of a prompt; the prefixes of so many need about a gigabyte


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

    def num_leaves(self) -> int:
        """Count all leaves."""
        return self.num_ended() + len(self.going_on) ** self.depth


def world_tree(max_new_tokens: int) -> Tree:
    """Return the tree of all responses in the words of the world.

    Raises: InputError if there are too many to enumerate.
    """
    tree = Tree(VOCABULARY, max_new_tokens)
    if tree.num_leaves() > MAX_LEAVES:
        raise InputError(
            f"--max_new_tokens={max_new_tokens}: {tree.num_leaves():,} responses are too many to "
            f"enumerate, {MAX_LEAVES:,} at most"
        )
    return tree


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
    sight: dict[str, Tensor] = {}  # what a token may see, where that is not all before it
    prefix = torch.zeros(1, dtype=torch.float64)  # log-probability of each prefix
    ended = []
    for position in range(tree.depth):
        output = model(input_ids=tokens, past_key_values=past, use_cache=True, **sight)
        past = output.past_key_values
        new = output.logits[:, -1:] if position == 0 else output.logits
        logits = new.flatten(end_dim=1).double() / temperature  # (prefixes, V)
        if position < min_gen_len:
            logits[:, early] = -torch.inf
        logprobs = prefix[:, None] + logits.log_softmax(dim=1)
        ended.append(logprobs[:, eos_id])
        prefix = logprobs[:, going_on].flatten()
        if position + 2 < tree.depth:
            past.batch_repeat_interleave(len(going_on))
            tokens = going_on.repeat(len(logits))[:, None]
        elif position + 2 == tree.depth:
            # The last tokens need no prefix of their own behind them: all that may follow a prefix
            # stand in one row, at one place, and none sees another.
            tokens = going_on.expand(len(logits), -1)
            length = past.get_seq_length()
            apart = torch.eye(len(going_on), dtype=torch.bool)
            seen = torch.cat((apart.new_ones(len(going_on), length), apart), dim=1)
            # Added to the scores, since not every attention takes a mask of booleans for one.
            mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, -torch.inf)
            sight = {
                "attention_mask": mask.expand(len(logits), 1, -1, -1),
                "position_ids": torch.full_like(tokens, length),
            }
    return torch.cat((*ended, prefix))


@cache
def graded_leaves(tree: Tree) -> list[tuple[int, str]]:
    """The leaves of the world that any prompt may grade above 1: a phrase, and at most one name."""
    shapes = [(phrase, *name) for phrase in MEANINGS for name in ((), *((n,) for n in NAMES))]
    texts = {" ".join(shape) for shape in shapes}
    return [(leaf, text) for leaf, text in enumerate(tree.texts()) if text in texts]


def leaf_rewards(prompt: str, tree: Tree, *, missing_eos_penalty: float) -> Tensor:
    """The reward (N,) that PPO maximises, of every leaf: gold, less the penalty without an EOS."""
    rewards = torch.ones(tree.num_leaves(), dtype=torch.float64)
    leaves, texts = zip(*graded_leaves(tree), strict=True)
    gold = gold_reward([prompt] * len(texts), list(texts))
    rewards[list(leaves)] = torch.tensor(gold, dtype=torch.float64)
    rewards[tree.num_ended() :] -= missing_eos_penalty
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


class Question(NamedTuple):
    """A prompt, and all there is to know before a policy answers it: N leaves, float64."""

    prompt_ids: list[int]
    rewards: Tensor  # (N,)
    start_logprobs: Tensor  # (N,)  of the reference as it is sampled: -inf where it may not go
    ref_logprobs: Tensor  # (N,)  of the reference, over everything


def optimum(question: Question, beta: float) -> tuple[Tensor, float]:
    """Return the log-probabilities (N,) of pi*, and J(pi*) = beta * log Z.

    Source: Ziegler et al., 1909.08593; 2305.18290, equation 4.

    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> question = Question([], torch.tensor([0.0, 1.0], dtype=torch.float64), half, half)
    >>> best, objective = optimum(question, beta=1.0)
    >>> [round(float(p), 4) for p in best.exp()], round(objective, 4)  # 1 : e, log((1 + e) / 2)
    ([0.2689, 0.7311], 0.6201)
    """
    weights = question.ref_logprobs + question.rewards / beta
    weights = torch.where(question.start_logprobs.isneginf(), -torch.inf, weights)
    log_z = weights.logsumexp(dim=0)
    return weights - log_z, float(beta * log_z)


def reward_and_kl(logprobs: Tensor, question: Question) -> tuple[float, float]:
    """Return E[r], and KL from the reference in nats, of a policy given by its leaves (N,)."""
    reward = expectation(logprobs, question.rewards)
    return float(reward), float(expectation(logprobs, logprobs - question.ref_logprobs))


def exact_figures(logprobs: Tensor, question: Question, *, beta: float) -> Exact:
    """Compare a policy, given by its leaves (N,), with the start and with the optimum."""
    best, best_objective = optimum(question, beta)
    reward, kl = reward_and_kl(logprobs, question)
    start_reward, start_kl = reward_and_kl(question.start_logprobs, question)
    best_reward, best_kl = reward_and_kl(best, question)
    return Exact(
        reward=reward,
        kl=kl,
        objective=reward - beta * kl,
        start_objective=start_reward - beta * start_kl,
        best_objective=best_objective,
        best_reward=best_reward,
        best_kl=best_kl,
    )


def share_of_gain(figures: Sequence[Exact]) -> float:
    """Share of the possible gain over all prompts: a ratio of means, not a mean of ratios."""
    gained = sum(f.objective - f.start_objective for f in figures)
    return gained / sum(f.best_objective - f.start_objective for f in figures)


class Exam(NamedTuple):
    """Questions to any number of policies, which are all sampled in the same way."""

    questions: list[Question]
    tree: Tree
    temperature: float
    min_gen_len: int

    def leaves(self, policy: Any, prompt_ids: Sequence[int]) -> Tensor:  # (N,)
        """Log-probabilities of a policy's responses, as it is sampled."""
        return leaf_logprobs(
            policy,
            prompt_ids,
            self.tree,
            temperature=self.temperature,
            min_gen_len=self.min_gen_len,
        )

    def figures(self, policy: Any, beta: float) -> list[Exact]:
        """Compute a policy's figures on every prompt."""
        policy = copy.deepcopy(policy).double()
        answers = ((self.leaves(policy, q.prompt_ids), q) for q in self.questions)
        return [exact_figures(leaves, q, beta=beta) for leaves, q in answers]

    def best_of(self, n: int, beta: float) -> list[Exact]:
        """Compute the figures of the reference when it answers with the best of `n` responses."""
        return [
            exact_figures(best_of_n(q.start_logprobs, q.rewards, n=n), q, beta=beta)
            for q in self.questions
        ]

    def frontier(self, betas: Sequence[float]) -> list[tuple[float, float]]:
        """KL and reward of pi* at each beta: no policy lies above the curve through them."""
        curve = []
        for beta in betas:
            best = [reward_and_kl(optimum(q, beta)[0], q) for q in self.questions]
            reward, kl = (sum(column) / len(best) for column in zip(*best, strict=True))
            curve.append((kl, reward))
        return curve


def prepare_exam(
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float,
    min_gen_len: int,
    max_new_tokens: int,
    missing_eos_penalty: float,
) -> Exam:
    """Enumerate the reference's responses to every prompt, and their rewards.

    Raises: InputError if there are too many.
    """
    exam = Exam([], world_tree(max_new_tokens), temperature, min_gen_len)
    reference = copy.deepcopy(reference).double()
    for prompt in prompts:
        prompt_ids = tokenizer(f"<instruction>{prompt}</instruction><response>")["input_ids"]
        start_logprobs = exam.leaves(reference, prompt_ids)
        exam.questions.append(
            Question(
                prompt_ids=prompt_ids,
                rewards=leaf_rewards(prompt, exam.tree, missing_eos_penalty=missing_eos_penalty),
                start_logprobs=start_logprobs,
                ref_logprobs=exam._replace(min_gen_len=0).leaves(reference, prompt_ids)
                if min_gen_len
                else start_logprobs,
            )
        )
    return exam
