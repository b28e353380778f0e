"""The exact optimum of the toy world, against brute force, an identity and plain sampling."""

import itertools
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import load_dataset
import run_dpo
import run_ppo
import run_sft
from toyworld.__main__ import main as make_world
from toyworld.__main__ import parse_args as parse_world
from toyworld.base_model import build_model, build_tokenizer
from toyworld.best_of import best_of_n
from toyworld.measure import load_policy, read_prompts, response_text
from toyworld.optimum import (
    Exam,
    Question,
    Tree,
    exact_figures,
    expectation,
    graded_leaves,
    leaf_logprobs,
    leaf_rewards,
    optimum,
    prepare_exam,
    reward_and_kl,
    share_of_gain,
    world_tree,
)
from toyworld.pairs import main as draw_pairs
from toyworld.pairs import parse_args as parse_pairs
from toyworld.world import EOS, MAX_RESPONSE_TOKENS, TAGS, VOCABULARY, gold_reward

SMALL = Tree((EOS, TAGS[-1], "hi"), 3)
TREE = world_tree(MAX_RESPONSE_TOKENS)
PROMPT = "greet casual brief to ada from bob"


def small_model(seed, attention="sdpa"):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=3, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = GPT2LMHeadModel(config).eval().double()
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def brute_force(model, prompt_ids, temperature, min_gen_len):
    """Every sequence of up to three tokens of {EOS, tag, word}, each by a forward of its own."""
    found = {}
    for length in (1, 2, 3):
        for ids in itertools.product(range(3), repeat=length):
            whole = 0 not in ids[:-1] and (ids[-1] == 0 or length == 3)
            if not whole:
                continue
            logprob = 0.0
            for t, token in enumerate(ids):
                logits = model(torch.tensor([[*prompt_ids, *ids[:t]]])).logits[0, -1] / temperature
                if t < min_gen_len:
                    logits[:2] = -torch.inf  # EOS and the closing tag
                logprob += float(logits.log_softmax(dim=0)[token])
            found[ids] = logprob
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("temperature", "min_gen_len"), [(1.0, 0), (0.7, 1), (1.5, 2)])
def test_enumeration_equals_brute_force_on_a_world_of_three_tokens(
    temperature, min_gen_len, attention
):
    model, prompt_ids = small_model(0, attention), [2, 1, 2]
    settings = {"temperature": temperature, "min_gen_len": min_gen_len}
    logprobs = leaf_logprobs(model, prompt_ids, SMALL, **settings)
    expected = brute_force(model, prompt_ids, **settings)
    ended = [ids for ids in expected if ids[-1] == 0]
    order = sorted(ended, key=lambda ids: (len(ids), ids))
    order += sorted(ids for ids in expected if ids[-1] != 0)
    assert len(logprobs) == len(expected) == 1 + 2 + 4 + 8
    assert logprobs.tolist() == pytest.approx([expected[ids] for ids in order], abs=1e-10)
    assert float(logprobs.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    texts = [" ".join(SMALL.words[i] for i in ids if i != 0) for ids in order]
    stripped = [t.removesuffix(TAGS[-1]).strip() for t in texts]
    assert SMALL.texts() == stripped


def small_question(policy_seed=1):
    """A policy's leaves, and a question with rewards at random; `min_gen_len` is 1."""
    policy, reference = small_model(policy_seed), small_model(2)
    p, start, ref = (
        leaf_logprobs(model, [2], SMALL, temperature=1.0, min_gen_len=min_gen_len)
        for model, min_gen_len in ((policy, 1), (reference, 1), (reference, 0))
    )
    rewards = torch.randn(len(p), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return p, Question([2], rewards, start, ref)


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
def test_share_is_one_minus_a_ratio_of_divergences_from_the_optimum(beta):
    p, question = small_question()
    figures = exact_figures(p, question, beta=beta)
    weights = question.ref_logprobs + question.rewards / beta
    best = torch.where(question.start_logprobs.isneginf(), -torch.inf, weights).log_softmax(dim=0)

    def divergence(q):
        return float(expectation(q, q - best))

    expected = 1 - divergence(p) / divergence(question.start_logprobs)
    assert share_of_gain([figures]) == pytest.approx(expected, abs=1e-9)
    # Nothing does better than the optimum, and the optimum reaches all of it.
    assert figures.objective <= figures.best_objective
    at_best = exact_figures(best, question, beta=beta)
    assert share_of_gain([at_best]) == pytest.approx(1.0, abs=1e-9)
    assert at_best.objective == pytest.approx(at_best.best_objective, abs=1e-9)
    assert (at_best.reward, at_best.kl) == pytest.approx((figures.best_reward, figures.best_kl))
    at_start = exact_figures(question.start_logprobs, question, beta=beta)
    assert share_of_gain([at_start]) == pytest.approx(0.0, abs=1e-12)


def test_share_over_prompts_is_a_ratio_of_means():
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    question = Question([], torch.tensor([0.0, 1.0], dtype=torch.float64), half, half)
    some = exact_figures(half, question, beta=1.0)
    one = some._replace(objective=some.start_objective + 1, best_objective=some.start_objective + 2)
    two = some._replace(objective=some.start_objective, best_objective=some.start_objective + 6)
    assert share_of_gain([one, two]) == pytest.approx(1 / 8)


def test_no_policy_lies_above_the_frontier():
    """A policy has at most the reward of the optimum at its KL, which a bisection finds."""
    for seed in (3, 4, 5):
        p, question = small_question(seed)
        reward, kl = reward_and_kl(p, question)
        low, high = 1e-3, 1e3
        for _ in range(200):
            beta = (low * high) ** 0.5
            at_beta = reward_and_kl(optimum(question, beta)[0], question)
            low, high = (beta, high) if at_beta[1] > kl else (low, beta)
        assert at_beta[1] <= kl + 1e-9
        assert reward <= at_beta[0] + 1e-9
    curve = Exam([question], SMALL, 1.0, 1).frontier([0.01, 0.1, 1.0, 10.0])
    assert curve == sorted(curve, reverse=True)  # a smaller beta buys reward with KL
    assert [kl for kl, _ in curve] == sorted({kl for kl, _ in curve}, reverse=True)


def test_best_of_two_worked_by_hand():
    """Rewards 1, 2, 2, 3 with chances 1/2, 1/8, 1/8, 1/4; F is 1/2, 3/4, 1."""
    p = torch.tensor([1 / 2, 1 / 8, 1 / 8, 1 / 4], dtype=torch.float64).log()
    rewards = torch.tensor([1.0, 2.0, 2.0, 3.0])
    # F(r)^2 - F(r-)^2 = 1/4, 9/16 - 1/4, 1 - 9/16; the two of reward 2 share alike.
    expected = [4 / 16, 2.5 / 16, 2.5 / 16, 7 / 16]
    assert best_of_n(p, rewards, n=2).exp().tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(best_of_n(p, rewards, n=1), p)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_equals_brute_force_on_a_world_of_three_tokens(n):
    """Every way to draw n responses, and who is the best of them; equals share the draw."""
    question = small_question()[1]
    rewards = question.rewards.round()  # so that many are equal
    p = question.start_logprobs.exp().tolist()
    expected = [0.0] * len(p)
    for drawn in itertools.product(range(len(p)), repeat=n):
        chance = math.prod(p[leaf] for leaf in drawn)
        best = max(float(rewards[leaf]) for leaf in drawn)
        winners = [leaf for leaf in drawn if float(rewards[leaf]) == best]
        for leaf in winners:
            expected[leaf] += chance / len(winners)
    found = best_of_n(question.start_logprobs, rewards, n=n)
    assert found.exp().tolist() == pytest.approx(expected, abs=1e-12)
    assert found.isneginf().tolist() == question.start_logprobs.isneginf().tolist()


def test_best_of_n_agrees_with_sampling():
    p, question = small_question()
    drawn = torch.multinomial(
        p.exp(), 40_000 * 4, replacement=True, generator=torch.Generator().manual_seed(0)
    ).view(-1, 4)
    best = question.rewards[drawn].amax(dim=1)
    exact = float(expectation(best_of_n(p, question.rewards, n=4), question.rewards))
    assert abs(float(best.mean()) - exact) < 4 * float(best.std()) / 40_000**0.5


@pytest.mark.parametrize("n", [2, 6, 100])
def test_best_of_n_costs_at_most_log_n_less_its_share(n):
    """The bound is reached where no two rewards are equal and no response is likely."""
    bound = math.log(n) - (n - 1) / n
    p, question = small_question()
    q = best_of_n(p, question.rewards, n=n)
    assert 0 < float(expectation(q, q - p)) < bound
    even = torch.full((200_000,), -math.log(200_000), dtype=torch.float64)
    q = best_of_n(even, torch.arange(200_000), n=n)
    assert float(q.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    assert float(expectation(q, q - even)) == pytest.approx(bound, abs=0.01)


def test_the_figures_of_best_of_n_are_of_the_reference_as_it_is_sampled():
    _, question = small_question()
    exam = Exam([question], SMALL, 1.0, 1)
    (one,) = exam.best_of(1, beta=0.2)
    assert share_of_gain([one]) == pytest.approx(0.0, abs=1e-12)
    (many,) = exam.best_of(100_000, beta=0.2)
    possible = question.rewards[~question.start_logprobs.isneginf()]
    assert many.reward == pytest.approx(float(possible.max()), abs=1e-6)


@pytest.mark.slow
def test_exact_reward_agrees_with_sampling():
    """4,000 samples from the enumerated distribution of an untrained toy model."""
    model, tokenizer = build_model(0).double().eval(), build_tokenizer()
    prompt_ids = tokenizer(f"<instruction>{PROMPT}</instruction><response>").input_ids
    logprobs = leaf_logprobs(model, prompt_ids, TREE, temperature=1.0, min_gen_len=0)
    rewards = leaf_rewards(PROMPT, TREE, missing_eos_penalty=1.0)
    exact = float(expectation(logprobs, rewards))
    ids = torch.tensor([prompt_ids] * 4_000)
    generator, alive = torch.Generator().manual_seed(0), torch.ones(4_000, dtype=torch.bool)
    written = []
    for _ in range(TREE.depth):
        with torch.no_grad():
            probabilities = model(ids).logits[:, -1].softmax(dim=1)
        tokens = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        written.append(tokens.where(alive, 0))
        alive &= tokens != VOCABULARY.index(EOS)
        ids = torch.cat((ids, tokens[:, None]), dim=1)
    texts = [response_text(tokenizer, row) for row in torch.stack(written, dim=1).tolist()]
    sampled = torch.tensor(gold_reward([PROMPT] * 4_000, texts)) - alive.float()
    error = float(sampled.std()) / 4_000**0.5
    assert abs(float(sampled.mean()) - exact) < 4 * error


@pytest.mark.slow
def test_only_graded_leaves_can_earn_more_than_1():
    texts = TREE.texts()
    graded = {leaf for leaf, _ in graded_leaves(TREE)}
    some = sorted({*range(0, len(texts), 37), *graded})
    for prompt in (PROMPT, "from eve part to bob full formal"):
        gold = gold_reward([prompt] * len(some), [texts[leaf] for leaf in some])
        rewards = leaf_rewards(prompt, TREE, missing_eos_penalty=0.0)
        assert rewards[list(some)].tolist() == gold
        others = [value for leaf, value in zip(some, gold, strict=True) if leaf not in graded]
        assert set(others) == {1.0}


def test_a_missing_eos_costs_its_penalty():
    plain, fined = (leaf_rewards(PROMPT, TREE, missing_eos_penalty=p) for p in (0.0, 0.5))
    num_ended = TREE.num_ended()
    assert torch.equal(plain[:num_ended], fined[:num_ended])
    assert torch.equal(plain[num_ended:] - 0.5, fined[num_ended:])


def test_a_model_of_other_words_is_refused():
    with pytest.raises(ValueError, match="3 tokens in the model, 24 here"):
        leaf_logprobs(small_model(0), [2], TREE, temperature=1.0, min_gen_len=0)


@pytest.fixture(scope="module")
def trained_world(tmp_path_factory):
    """A world, and SFT from random weights in it."""
    root = tmp_path_factory.mktemp("optimum")
    make_world(parse_world([f"--out_dir={root}/world", "--num_prompts=4000"]))
    source = f"--dataset={root}/world/ultrafeedback.jsonl"
    ratios = ["--language=any", "--sft_ratio=0.5", "--rm_ratio=0"]
    load_dataset.main(load_dataset.parse_args([source, f"--data_dir={root}/data", *ratios]))
    sft = [f"--model_id={root}/world/gpt2-toy", "--learning_rate=2e-3", "--num_epochs=5"]
    sft += [f"--data_dir={root}/data/sft", f"--ckpt_dir={root}/sft"]
    run_sft.main(run_sft.parse_args([*sft, "--max_len=64", "--batch_size=32"]))
    return root


def train_on_gold(root, name, *options):
    """PPO on the gold reward."""
    ppo = [f"--sft_model_path={root}/sft/best", f"--data_dir={root}/data/pref"]
    ppo += [f"--ckpt_dir={root}/{name}", "--reward_fn=toyworld:gold_reward", "--max_len=64"]
    ppo += ["--temperature=1", "--top_k=0", "--max_new_tokens=4", "--learning_rate=5e-4"]
    run_ppo.main(run_ppo.parse_args([*ppo, "--minibatch_size=64", *options]))


def shares_of_gain(root, *names):
    """How much of the gain at beta 0.2 some runs have reached; the SFT model has 0."""
    models = {name: load_policy(f"{root}/{name}/best", flag=name) for name in ("sft", *names)}
    exam = prepare_exam(
        models["sft"],
        build_tokenizer(),
        read_prompts(f"{root}/data/pref", "eval")[:8],
        temperature=1.0,
        min_gen_len=1,
        max_new_tokens=4,
        missing_eos_penalty=1.0,
    )
    shares = {name: share_of_gain(exam.figures(model, 0.2)) for name, model in models.items()}
    assert shares["sft"] == pytest.approx(0.0, abs=1e-12)
    return shares


@pytest.mark.slow
@pytest.mark.claim(20)
def test_ppo_and_dpo_reach_the_optimum_of_the_toy_world(trained_world):
    """PPO on the gold reward, and DPO on pairs of the SFT model's own."""
    root = trained_world
    train_on_gold(root, "ppo", "--num_outer_epoch=6", "--batch_size=256")
    start, prompts = f"--sft_model_path={root}/sft/best", f"--data_dir={root}/data/pref"
    pairs = [start, prompts, f"--out_dir={root}/pairs", "--num_pairs=20000"]
    draw_pairs(parse_pairs([*pairs, "--temperature=1.25"]))
    dpo = [start, f"--data_dir={root}/pairs", f"--ckpt_dir={root}/dpo", "--max_len=14"]
    dpo += ["--beta=0.4", "--batch_size=50", "--learning_rate=5e-4"]
    run_dpo.main(run_dpo.parse_args(dpo))
    shares = shares_of_gain(root, "ppo", "dpo")
    assert 0.9 <= shares["ppo"] <= 1.0
    assert 0.8 <= shares["dpo"] <= 1.0


@pytest.mark.slow
@pytest.mark.claim(20)
@pytest.mark.parametrize("advantage", ["rloo", "dr_grpo", "grpo"])
def test_without_a_critic_the_optimum_of_the_toy_world_is_reached_too(trained_world, advantage):
    """With as many sampled responses as PPO has above: 37 rollouts of 4 to each of 64 prompts.

    GRPO has another objective, which this world hardly tells from ours.
    """
    group = [f"--advantage={advantage}", "--num_responses=4", "--batch_size=64"]
    train_on_gold(trained_world, advantage, *group, "--num_outer_epoch=2", "--max_steps=37")
    assert 0.9 <= shares_of_gain(trained_world, advantage)[advantage] <= 1.0
