"""Hidden states to log-probabilities of tokens and sequences, and the entropy beside them.

Logits over the vocabulary are made for a few hundred real response tokens at a time, in float32,
and are gone before the next few hundred: a (B, T, V) tensor never exists. With gradients, each
piece is computed again in the backward pass instead of being kept.

The policy is the distribution that is sampled. Where temperature, top-k, top-p and `min_gen_len`
shape a rollout they shape its logprobs too, by way of a `Support`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.masked import require_same_shape

CHUNK = 512  # tokens whose logits exist at the same time: 100 MB with GPT-2's vocabulary

Head = Callable[[Tensor], Tensor]  # (N, D) -> (N, V): the model's output embeddings


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


def forbid_early_end(
    logits: Tensor,  # (N, V)
    positions: Tensor,  # (N,)  in the response, from 0
    early_end_ids: Tensor,
    *,
    min_gen_len: int,
) -> Tensor:  # (N, V)
    """Give a logit of -inf to the ids that may not come before position `min_gen_len`."""
    ends = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    ends[early_end_ids] = True
    return logits.masked_fill((positions < min_gen_len)[:, None] & ends, -torch.inf)


def full_logits(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """Logits over the vocabulary in float32, whatever precision the trunk ran in: (N, V)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float()) / temperature


def support_logits(
    logits: Tensor,  # (N, V)
    positions: Tensor,  # (N,)
    kept_ids: Tensor | None,  # (N, K)
    support: Support | None,
) -> Tensor:  # (N, V) or (N, K)
    """Keep the logits of the support, in any order; the others are -inf or left out."""
    if support is None:
        return logits
    if kept_ids is None:
        return forbid_early_end(
            logits, positions, support.early_end_ids, min_gen_len=support.min_gen_len
        )
    kept = logits.gather(1, kept_ids.clamp(min=0).long())
    return kept.masked_fill(kept_ids < 0, -torch.inf)


Chunk = tuple[Tensor, Tensor, Tensor, Tensor | None]  # hidden, ids, positions, kept_ids


def real_token_chunks(
    hidden: Tensor, ids: Tensor, mask: Tensor, support: Support | None
) -> Iterator[Chunk]:
    """Yield the real tokens of a batch, at most CHUNK at a time, in the order of `x[mask]`."""
    require_same_shape(hidden=hidden[:, :, 0], ids=ids, mask=mask)
    rows, positions = mask.nonzero(as_tuple=True)  # (N,) each
    for r, p in zip(rows.split(CHUNK), positions.split(CHUNK), strict=True):
        kept_ids = support.kept_ids[r, p] if support and support.kept_ids is not None else None
        yield hidden[r, p], ids[r, p], p, kept_ids


def token_logprobs(
    hidden: Tensor,  # (B, R, D)  the states that predict the response tokens
    ids: Tensor,  # (B, R)
    mask: Tensor,  # (B, R) bool
    head: Head,
    *,
    temperature: float,
    support: Support | None = None,
) -> Tensor:  # (B, R)
    """Log-probability of each response token under the distribution that is sampled.

        z_t = logit_t / temperature
        log p(y_t) = z_t[y_t] - log sum_{v in support} exp(z_t[v])

    0 outside the mask. Without `support` the sum runs over the whole vocabulary.
    """

    def chunk_logprobs(
        hidden: Tensor, ids: Tensor, positions: Tensor, kept_ids: Tensor | None
    ) -> Tensor:  # (N,)
        logits = full_logits(hidden, head, temperature)
        chosen = logits.gather(1, ids[:, None]).squeeze(1)
        return chosen - support_logits(logits, positions, kept_ids, support).logsumexp(dim=1)

    chunks = real_token_chunks(hidden, ids, mask, support)
    if torch.is_grad_enabled():
        again = partial(checkpoint, chunk_logprobs, use_reentrant=False, preserve_rng_state=False)
        parts = [again(*chunk) for chunk in chunks]
    else:
        parts = [chunk_logprobs(*chunk) for chunk in chunks]
    return spread(parts, mask)


@torch.no_grad()
def token_stats(
    hidden: Tensor,  # (B, R, D)
    ids: Tensor,  # (B, R)
    mask: Tensor,  # (B, R) bool
    head: Head,
    *,
    temperature: float,
    support: Support | None = None,
) -> TokenStats:
    """`token_logprobs` without gradient, with entropy and kept mass from the same logits."""
    logprobs, entropy, kept_mass = [], [], []
    for states, tokens, positions, kept_ids in real_token_chunks(hidden, ids, mask, support):
        logits = full_logits(states, head, temperature)
        allowed = support_logits(logits, positions, kept_ids, support)
        logsumexp = allowed.logsumexp(dim=1)
        logprobs.append(logits.gather(1, tokens[:, None]).squeeze(1) - logsumexp)
        entropy.append(torch.special.entr((allowed - logsumexp[:, None]).exp()).sum(dim=1))
        kept_mass.append((logsumexp - logits.logsumexp(dim=1)).exp())
    return TokenStats(spread(logprobs, mask), spread(entropy, mask), spread(kept_mass, mask))


def spread(parts: list[Tensor], mask: Tensor) -> Tensor:
    """Put the numbers of the real tokens back into their places: a (B, R) tensor, 0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_scatter(mask, torch.cat(parts)) if parts else zeros


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:  # (B, R), (B, R) -> (B,)
    """Log-probability of whole responses: the sum over their real tokens."""
    require_same_shape(logprobs=logprobs, mask=mask)
    return torch.where(mask, logprobs, 0.0).sum(dim=1)
