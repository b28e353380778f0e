"""Hidden states to log-probabilities of tokens and sequences, and the entropy beside them.

Logits over the vocabulary are made in float32, at real response tokens only, and for some hundred
of them at a time: a (B, T, V) tensor never exists. (A model that gives logits instead of states
has made them itself: see `rlhf.heads`.)

The policy is the distribution that is sampled. Where temperature, top-k, top-p and `min_gen_len`
shape a rollout they shape its logprobs too, by way of a `Support`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Linear
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from rlhf.masked import require_same_shape

CHUNK = 1024  # tokens whose logits are made together: 200 MB with GPT-2's vocabulary
NUMBERS_KEPT = 2**28  # logprobs that wait for the backward pass: 1 GB; the rest is made again


class Support(NamedTuple):
    """Which tokens could be sampled at each position of a rollout."""

    kept_ids: Tensor | None  # (B, R, K) int32, what top-k and top-p left, -1 = unused; None = all
    early_end_ids: Tensor  # ids that could not come at the first `min_gen_len` positions
    min_gen_len: int

    def select(self, rows: Tensor, width: int) -> "Support":
        """Keep some rows, and the first `width` response positions."""
        if self.kept_ids is None:
            return self
        return self._replace(kept_ids=self.kept_ids[rows, :width])


class TokenStats(NamedTuple):
    """Numbers of each response token: (B, R) each, 0 outside the mask."""

    logprobs: Tensor
    entropy: Tensor  # nats, of the distribution over the support
    kept_mass: Tensor  # the part of the distribution over all tokens that lies in the support


def forbid_early_end_(
    logits: Tensor,  # (N, V), changed in place
    positions: Tensor,  # (N,)  in the response, from 0
    early_end_ids: Tensor,
    *,
    min_gen_len: int,
) -> Tensor:  # (N, V)
    """Give a logit of -inf to the ids that may not come before position `min_gen_len`."""
    too_early = (positions < min_gen_len)[:, None]  # (N, 1)
    logits[:, early_end_ids] = logits[:, early_end_ids].masked_fill(too_early, -torch.inf)
    return logits


def full_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor | None,  # (V, D)
    bias: Tensor | None,  # (V,)
    temperature: float,
) -> Tensor:  # (N, V)
    """Logits over the vocabulary in float32, whatever precision the trunk ran in.

    Without a weight the states are logits already. The result may be overwritten.
    """
    if weight is None:
        return hidden.to(torch.float32, copy=True).div_(temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden.float(), weight, bias)
    return logits if temperature == 1.0 else logits / temperature


def weights_of(head: Linear | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a head's weight and bias."""
    return (None, None) if head is None else (head.weight, head.bias)


def logits_at(
    hidden: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    head: Linear | None,
    temperature: float,
) -> Tensor:  # (N, K)
    """Logits of a few ids of each token, by those rows of the head alone."""
    if head is None:
        return hidden.gather(1, ids.long()).float() / temperature
    num_ids, (num_all, width) = ids.shape[1], head.weight.shape
    if num_ids * width >= num_all:  # then gathering the rows would take more memory
        return full_logits(hidden, *weights_of(head), temperature).gather(1, ids)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = embedding(ids, head.weight)  # (N, K, D)
        logits = (rows * hidden.float()[:, None]).sum(dim=2)
        if head.bias is not None:
            logits = logits + head.bias[ids]
    return logits / temperature


class VocabularyLogprobs(torch.autograd.Function):
    """log softmax of a linear head at one id a row, and its gradient, a chunk at a time.

        z = (h W' + b) / temperature,  log p(y) = z[y] - log sum_v exp(z[v])
        d log p(y) / dz[v] = [v = y] - p(v)

    Without a head (weight None) the states are the logits.

    What waits for the backward pass is log p of every id, and there turns into the gradient of z in
    place: one buffer, where autograd would hold the logits and make three more like them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor | None,  # (V, D)
        bias: Tensor | None,  # (V,)
        ids: Tensor,  # (N,)
        positions: Tensor,  # (N,)
        temperature: float,
        support: Support | None,
    ) -> Tensor:  # (N,)
        """Keep what fits into `NUMBERS_KEPT`; the rest is computed again."""

        def log_softmax(part: slice) -> Tensor:  # (at most CHUNK, V)
            logits = full_logits(hidden[part], weight, bias, temperature)
            if support is not None:
                here, least = positions[part], support.min_gen_len
                forbid_early_end_(logits, here, support.early_end_ids, min_gen_len=least)
            return logits.log_softmax(dim=1)

        ctx.save_for_backward(hidden, weight, ids)
        ctx.log_softmax, ctx.temperature, ctx.kept = log_softmax, temperature, []
        needed, chosen = any(ctx.needs_input_grad), []
        for part in chunks(len(hidden)):
            logprobs = log_softmax(part)
            chosen.append(logprobs.gather(1, ids[part, None]).squeeze(1))
            if needed and part.stop * logprobs.shape[1] <= NUMBERS_KEPT:
                ctx.kept.append(logprobs)
        return torch.cat(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # (N,)
        hidden, weight, ids = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight) if wants_weight else None
        bias_gradient = torch.zeros_like(weight[:, 0]) if wants_bias else None
        scaled = gradient[:, None] / ctx.temperature  # (N, 1)
        with torch.autocast(hidden.device.type, enabled=False):  # in float32 wherever it is called
            for part in chunks(len(hidden)):
                logprobs = ctx.kept.pop(0) if ctx.kept else ctx.log_softmax(part)
                dz = logprobs.exp_().mul_(-scaled[part])  # (at most CHUNK, V)
                dz.scatter_add_(1, ids[part, None], scaled[part])
                if hidden_gradient is not None:
                    hidden_gradient[part] = dz if weight is None else dz @ weight
                if weight_gradient is not None:
                    weight_gradient.addmm_(dz.T, hidden[part].to(weight.dtype))
                if bias_gradient is not None:
                    bias_gradient += dz.sum(dim=0)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None, None


def chunks(num_tokens: int) -> Iterator[slice]:
    """Cut a number of tokens into slices of at most CHUNK; at least one, which may be empty."""
    return (slice(i, min(i + CHUNK, num_tokens)) for i in range(0, max(num_tokens, 1), CHUNK))


class Tokens(NamedTuple):
    """Real tokens of a batch, one after another."""

    hidden: Tensor  # (N, D)
    ids: Tensor  # (N,)
    positions: Tensor  # (N,)
    kept_ids: Tensor | None  # (N, K) int32

    def slice(self, part: slice) -> "Tokens":
        """Take some of them."""
        kept_ids = None if self.kept_ids is None else self.kept_ids[part]
        return Tokens(self.hidden[part], self.ids[part], self.positions[part], kept_ids)


def real_tokens(hidden: Tensor, ids: Tensor, mask: Tensor, support: Support | None) -> Tokens:
    """Pick the real tokens of a batch, in the order of `x[mask]`."""
    require_same_shape(hidden=hidden[:, :, 0], ids=ids, mask=mask)
    rows, positions = mask.nonzero(as_tuple=True)  # (N,) each
    all_kept = support.kept_ids if support else None
    kept_ids = None if all_kept is None else all_kept[rows, positions]
    return Tokens(hidden[rows, positions], ids[rows, positions], positions, kept_ids)


def kept_logprobs(
    hidden: Tensor, ids: Tensor, kept_ids: Tensor, head: Linear | None, temperature: float
) -> Tensor:  # (N,)
    """Logprobs of a chunk's ids among the ids that were kept beside them."""
    kept = logits_at(hidden, kept_ids.clamp(min=0), head, temperature)  # (N, K)
    kept = kept.masked_fill(kept_ids < 0, -torch.inf)
    chosen = kept.masked_fill(kept_ids != ids[:, None], -torch.inf).amax(dim=1)
    return chosen - kept.logsumexp(dim=1)


def token_logprobs(
    hidden: Tensor,  # (B, R, D)  the states that predict the response tokens
    ids: Tensor,  # (B, R)
    mask: Tensor,  # (B, R) bool
    head: Linear | None,  # the model's output embeddings; None if `hidden` is logits (B, R, V)
    *,
    temperature: float,
    support: Support | None = None,
) -> Tensor:  # (B, R)
    """Log-probability of each response token under the distribution that is sampled.

        z_t = logit_t / temperature
        log p(y_t) = z_t[y_t] - log sum_{v in support} exp(z_t[v])

    0 outside the mask. Without `support` the sum runs over the whole vocabulary.
    """
    tokens = real_tokens(hidden, ids, mask, support)
    if tokens.kept_ids is None:
        logprobs = VocabularyLogprobs.apply(
            tokens.hidden,
            *weights_of(head),
            tokens.ids,
            tokens.positions,
            temperature,
            support,
        )
        return spread(logprobs, mask)
    again = partial(checkpoint, kept_logprobs, use_reentrant=False, preserve_rng_state=False)
    parts = [
        again(tokens.hidden[part], tokens.ids[part], tokens.kept_ids[part], head, temperature)
        for part in chunks(len(tokens.ids))
    ]
    return spread(torch.cat(parts), mask)


@torch.no_grad()
def token_stats(
    hidden: Tensor,  # (B, R, D)
    ids: Tensor,  # (B, R)
    mask: Tensor,  # (B, R) bool
    head: Linear | None,
    *,
    temperature: float,
    support: Support | None = None,
) -> TokenStats:
    """`token_logprobs` without gradient, with entropy and kept mass beside them."""
    tokens = real_tokens(hidden, ids, mask, support)
    logprobs, entropy, kept_mass = [], [], []
    for part in chunks(len(tokens.ids)):
        here = tokens.slice(part)
        logits = full_logits(here.hidden, *weights_of(head), temperature)  # (N, V)
        whole = logits.logsumexp(dim=1)
        if here.kept_ids is not None:
            logits = logits.gather(1, here.kept_ids.clamp(min=0).long())  # (N, K)
            logits = logits.masked_fill(here.kept_ids < 0, -torch.inf)
        elif support is not None:
            least = support.min_gen_len
            forbid_early_end_(logits, here.positions, support.early_end_ids, min_gen_len=least)
        allowed = logits.log_softmax(dim=1)
        if here.kept_ids is None:
            chosen = allowed.gather(1, here.ids[:, None]).squeeze(1)
        else:  # rounded as in training
            chosen = kept_logprobs(here.hidden, here.ids, here.kept_ids, head, temperature)
        logprobs.append(chosen)
        entropy.append(-(allowed.exp() * allowed.clamp(min=torch.finfo().min)).sum(dim=1))
        kept_mass.append((logits.logsumexp(dim=1) - whole).exp())
    return TokenStats(*(spread(torch.cat(x), mask) for x in (logprobs, entropy, kept_mass)))


def spread(numbers: Tensor, mask: Tensor) -> Tensor:  # (N,), (B, R) -> (B, R)
    """Put the numbers of the real tokens back into their places: 0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_scatter(mask, numbers)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:  # (B, R), (B, R) -> (B,)
    """Log-probability of whole responses: the sum over their real tokens."""
    require_same_shape(logprobs=logprobs, mask=mask)
    return torch.where(mask, logprobs, 0.0).sum(dim=1)
