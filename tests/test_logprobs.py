"""Logprobs against the plain definition: log_softmax of whole logits, then gather."""

import copy

import pytest
import torch

import rlhf.logprobs
from rlhf.logprobs import Support, full_logits, sequence_logprobs, token_logprobs, token_stats

B, R, D, V = 3, 5, 8, 23
EARLY = torch.tensor([0, 4])


@pytest.fixture
def parts():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, R, D, generator=rng)
    head = torch.nn.Linear(D, V, bias=False)
    torch.nn.init.normal_(head.weight, generator=rng)
    mask = torch.arange(R) < torch.tensor([[5], [2], [3]])
    return hidden, head, mask, rng


def plain(hidden, head, ids, temperature, allowed):
    logits = (head(hidden) / temperature).masked_fill(~allowed, -torch.inf)
    return logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def kept_support(rng, num_kept):
    kept_ids = torch.stack([torch.randperm(V, generator=rng) for _ in range(B * R)])
    kept_ids = kept_ids.view(B, R, V)[:, :, :num_kept].clone()
    kept_ids[:, 1::2, num_kept // 2 :] = -1  # top-p keeps fewer at some positions
    allowed = torch.zeros(B, R, V + 1, dtype=torch.bool).scatter(-1, kept_ids % (V + 1), True)
    return Support(kept_ids.int(), EARLY, 0), allowed[..., :V], kept_ids[..., 0]


@pytest.mark.claim(10, 24)
@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("chunk", [512, 3])
def test_full_vocabulary(parts, temperature, chunk, monkeypatch):
    monkeypatch.setattr(rlhf.logprobs, "CHUNK", chunk)
    hidden, head, mask, rng = parts
    ids = torch.randint(V, (B, R), generator=rng)
    ours = token_logprobs(hidden, ids, mask, head, temperature=temperature)
    theirs = plain(hidden, head, ids, temperature, torch.ones(V, dtype=torch.bool))
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
    assert ours[~mask].abs().sum() == 0


@pytest.mark.claim(10)
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_logprobs_are_of_the_truncated_distribution(parts, temperature):
    hidden, head, mask, rng = parts
    support, allowed, ids = kept_support(rng, 6)
    theirs = plain(hidden, head, ids, temperature, allowed)
    ours = token_logprobs(hidden, ids, mask, head, temperature=temperature, support=support)
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
    stats = token_stats(hidden, ids, mask, head, temperature=temperature, support=support)
    torch.testing.assert_close(stats.logprobs, ours)


@pytest.mark.claim(10)
def test_early_end_is_outside_the_support_for_the_first_positions_only(parts):
    hidden, head, mask, rng = parts
    ids = torch.randint(5, V, (B, R), generator=rng)
    allowed = torch.ones(B, R, V, dtype=torch.bool)
    allowed[:, :2, EARLY] = False
    support = Support(None, EARLY, 2)
    ours = token_logprobs(hidden, ids, mask, head, temperature=1.0, support=support)
    theirs = plain(hidden, head, ids, 1.0, allowed)
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)


@pytest.mark.claim(10)
def test_kept_mass_and_entropy_follow_their_definitions(parts):
    hidden, head, mask, rng = parts
    support, allowed, ids = kept_support(rng, 6)
    stats = token_stats(hidden, ids, mask, head, temperature=0.7, support=support)
    full = (head(hidden) / 0.7).softmax(dim=-1)
    mass = (full * allowed).sum(dim=-1)
    kept = full * allowed / mass[..., None]
    entropy = -(kept * kept.clamp(min=1e-30).log()).sum(dim=-1)
    torch.testing.assert_close(stats.kept_mass[mask], mass[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.entropy[mask], entropy[mask], atol=1e-5, rtol=0)
    # Over the whole vocabulary the logprob is lower by -log of the kept mass.
    whole = token_logprobs(hidden, ids, mask, head, temperature=0.7)
    gap = (stats.logprobs - whole)[mask]
    torch.testing.assert_close(gap, -mass[mask].log(), atol=1e-5, rtol=0)


@pytest.mark.claim(24)
@pytest.mark.parametrize("numbers_kept", [2**28, 4 * V, 0], ids=["kept", "one chunk kept", "again"])
@pytest.mark.parametrize("num_kept", [None, "early end", 6, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_equal_the_plain_ones(parts, monkeypatch, numbers_kept, num_kept, bias):
    """Against autograd through whole logits in float64. 2 ids x 8 numbers < 23: rows gathered."""
    monkeypatch.setattr(rlhf.logprobs, "CHUNK", 4)
    monkeypatch.setattr(rlhf.logprobs, "NUMBERS_KEPT", numbers_kept)
    hidden, head, mask, rng = parts
    if bias:
        head.bias = torch.nn.Parameter(torch.randn(V, generator=rng))
    support, allowed = None, torch.ones(B, R, V, dtype=torch.bool)
    ids = torch.randint(5, V, (B, R), generator=rng)
    if num_kept == "early end":
        support = Support(None, EARLY, 2)
        allowed[:, :2, EARLY] = False
    elif num_kept:
        support, allowed, ids = kept_support(rng, num_kept)
    gradients = []
    for function, dtype in ((token_logprobs, torch.float32), (plain, torch.float64)):
        states = hidden.to(dtype, copy=True).requires_grad_()
        layer = copy.deepcopy(head).to(dtype)
        if function is plain:
            logprobs = plain(states, layer, ids, 0.5, allowed)
        else:
            logprobs = function(states, ids, mask, layer, temperature=0.5, support=support)
        (logprobs * torch.arange(R))[mask].sum().backward()
        gradients.append([x.grad for x in (states, *layer.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-6)


@pytest.mark.claim(10, 24)
@pytest.mark.parametrize("numbers_kept", [2**28, 0], ids=["kept", "again"])
@pytest.mark.parametrize("num_kept", [None, "early end", 6])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_serve_where_a_model_gives_no_states(
    parts, monkeypatch, numbers_kept, num_kept, temperature
):
    monkeypatch.setattr(rlhf.logprobs, "CHUNK", 4)
    monkeypatch.setattr(rlhf.logprobs, "NUMBERS_KEPT", numbers_kept)
    hidden, head, mask, rng = parts
    support, allowed = None, torch.ones(B, R, V, dtype=torch.bool)
    ids = torch.randint(5, V, (B, R), generator=rng)
    if num_kept == "early end":
        support = Support(None, EARLY, 2)
        allowed[:, :2, EARLY] = False
    elif num_kept:
        support, allowed, ids = kept_support(rng, num_kept)
    given = head(hidden).detach()
    results = []
    for function, dtype in ((token_logprobs, torch.float32), (plain, torch.float64)):
        logits = given.to(dtype, copy=True).requires_grad_()
        if function is plain:
            logprobs = plain(logits, torch.nn.Identity(), ids, temperature, allowed)
        else:
            settings = {"temperature": temperature, "support": support}
            stats = token_stats(logits, ids, mask, None, **settings)
            logprobs = token_logprobs(logits, ids, mask, None, **settings)
            assert torch.equal(stats.logprobs, logprobs)
            assert torch.equal(logits, given)  # nothing is forbidden in the model's own tensor
        (logprobs * torch.arange(R))[mask].sum().backward()
        results.append((logprobs[mask].float(), logits.grad.float()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("num_kept", [None, 2])
def test_a_batch_without_real_tokens_gives_zeros(parts, num_kept):
    hidden, head, mask, rng = parts
    support = kept_support(rng, num_kept)[0] if num_kept else None
    ids, nothing = torch.zeros(B, R, dtype=torch.long), torch.zeros_like(mask)
    states = hidden.clone().requires_grad_()
    logprobs = token_logprobs(states, ids, nothing, head, temperature=1.0, support=support)
    logprobs.sum().backward()
    assert not logprobs.any() and not states.grad.any()
    assert not token_stats(hidden, ids, nothing, head, temperature=1.0, support=support)[0].any()


def test_a_frozen_head_gets_no_gradient(parts):
    hidden, head, mask, rng = parts
    head.requires_grad_(False)
    ids = torch.randint(V, (B, R), generator=rng)
    states = hidden.clone().requires_grad_()
    token_logprobs(states, ids, mask, head, temperature=1.0).sum().backward()
    assert states.grad.abs().sum() > 0 and head.weight.grad is None


@pytest.mark.claim(10)
@pytest.mark.parametrize("num_kept", [6, 2], ids=["gathered logits", "gathered rows"])
def test_old_and_new_logprobs_round_alike(parts, num_kept):
    hidden, head, mask, rng = parts
    support, _, ids = kept_support(rng, num_kept)
    settings = {"temperature": 0.2, "support": support}
    old = token_stats(hidden, ids, mask, head, **settings).logprobs
    assert torch.equal(old, token_logprobs(hidden, ids, mask, head, **settings))


@pytest.mark.claim(24)
def test_logits_exist_for_a_few_real_tokens_at_a_time_and_in_float32(parts, monkeypatch):
    monkeypatch.setattr(rlhf.logprobs, "CHUNK", 4)
    hidden, head, mask, rng = parts
    shapes = []

    def watched(*args):
        logits = full_logits(*args)
        assert logits.dtype == torch.float32
        shapes.append(len(logits))
        return logits

    ids = torch.randint(V, (B, R), generator=rng)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        monkeypatch.setattr(rlhf.logprobs, "full_logits", watched)
        logprobs = token_logprobs(hidden.bfloat16(), ids, mask, head, temperature=1.0)
    assert shapes == [4, 4, 2] and sum(shapes) == int(mask.sum())
    assert logprobs.dtype == torch.float32


def test_sequence_logprob_sums_real_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")]])
    assert sequence_logprobs(logprobs, torch.tensor([[True, True, False]])).tolist() == [-3.0]
