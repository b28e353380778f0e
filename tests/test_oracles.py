"""Whole runs of the scripts against the formulas of docs/math.md, written out once more.

The other side is plain transformers and torch in float64, one sequence at a time, without padding,
masks or micro-batches. What it takes from a run are the sampled ids alone, and from the project the
order of rows. So it holds the wiring: that each number reaches the place where a formula wants it.
"""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

import run_dpo
import run_ppo
from rlhf.batches import epoch_order
from rlhf.optim import optimizer_step
from tests.conftest import write_jsonl
from tests.test_scripts import rows, run

MAX_REWARD = 1.5  # low enough to clip some pairwise rewards
PPO = SimpleNamespace(  # every setting matters to a number, and none is a default
    temperature=0.9, top_k=30, top_p=0.95, min_gen_len=2, max_new_tokens=14, max_samples=13,
    gamma=0.97, gae_lambda=0.8, beta=0.3, max_kl_div=0.5, max_reward=MAX_REWARD, epsilon=0.1,
    missing_eos_penalty=1.5, value_clip=0.06, value_loss_coeff=0.5, batch_size=7, minibatch_size=5,
    num_inner_epoch=2, learning_rate=1e-3, max_gradient_norm=0.7, eval_samples=4,
)  # fmt: skip
PPO_STEPS = 2 * PPO.num_inner_epoch * 2  # rollouts of 7 and 6 prompts, each in two minibatches
DPO = SimpleNamespace(batch_size=8, learning_rate=1e-3, beta=0.5, log_step=1)


def flags(settings):
    return [f"--{name}={value}" for name, value in vars(settings).items()]


def flat_gradient(parameters):
    return torch.cat([(0 * p if p.grad is None else p.grad).detach().flatten() for p in parameters])


def watch_updates(patch, script):
    """The updates a script will make: learning rate and unclipped gradient of each optimiser."""
    updates = []

    def watched(schedules, loss, **options):
        groups = [schedule.optimizer.param_groups[0] for schedule in schedules]
        updates.append([(group["lr"], flat_gradient(group["params"])) for group in groups])
        return optimizer_step(schedules, loss, **options)

    patch.setattr(script, "optimizer_step", watched)
    return updates


def step_all(optimizers, rate, max_norm):
    """Clip each optimiser's gradients, and step; returns what was done, and the first norm."""
    groups = [optimizer.param_groups[0] for optimizer in optimizers]
    update = [(rate, flat_gradient(group["params"])) for group in groups]
    norms = [nn.utils.clip_grad_norm_(group["params"], max_norm) for group in groups]
    for optimizer, group in zip(optimizers, groups, strict=True):
        group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return update, float(norms[0])


def assert_same_updates(updates, expected):
    for update, expected_update in zip(updates, expected, strict=True):
        for (rate, gradient), (wanted_rate, wanted) in zip(update, expected_update, strict=True):
            assert rate == pytest.approx(wanted_rate)
            assert float((gradient - wanted).norm()) <= 1e-4 * float(wanted.norm())


def assert_same_row(row, expected):
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def plain(auto_class, path):
    return auto_class.from_pretrained(path, dtype=torch.float64).eval()


def encode(tokenizer, prompt, response):
    prompt_ids = tokenizer(f"<instruction>{prompt}</instruction><response>").input_ids
    return prompt_ids, tokenizer(f"{response}</response><|endoftext|>").input_ids


def logits_of(model, prompt, response):  # (R, V)
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def token_logprobs(logits, response):  # (R, V) -> (R,)
    return logits.log_softmax(-1)[range(len(response)), response]


@pytest.fixture(scope="module")
def root(tmp_path_factory, base_path, data_dir):
    """An SFT model that ends some of its responses, and reward models with both losses."""
    root = tmp_path_factory.mktemp("oracles")
    run("sft", root, data_dir, f"--model_id={base_path}", "--learning_rate=3e-3", "--num_epochs=3")
    for loss in ("regression", "pairwise"):
        options = [f"--loss={loss}", f"--max_reward={MAX_REWARD}", "--learning_rate=3e-4"]
        run("rm", root, data_dir, *options, "--num_epochs=1", ckpt_dir=root / f"rm_{loss}")
    return root


# Reward model


@pytest.mark.claim(6, 8)
@pytest.mark.parametrize("loss", ["regression", "pairwise"])
def test_reward_model_reports_what_plain_transformers_makes_of_its_checkpoint(loss, root, data_dir):
    best = root / f"rm_{loss}/best"
    model = plain(AutoModelForSequenceClassification, best)
    tokenizer = AutoTokenizer.from_pretrained(best)
    logits = {}  # of each prompt's responses, the better one (9 of 10) first
    for line in (data_dir / "rm/eval.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt, response = encode(tokenizer, record["prompt"], record["response"])
        with torch.no_grad():
            logit = model(torch.tensor([prompt + response])).logits[0, 0]
        logits.setdefault(record["prompt"], {})[record["score"]] = logit
    table = torch.stack([torch.stack([of[9.0], of[2.0]]) for of in logits.values()])  # (N, 2)
    if loss == "pairwise":
        losses = -logsigmoid(table[:, 0] - table[:, 1])
        rewards = (table - table.mean()).clamp(-MAX_REWARD, MAX_REWARD)
    else:
        rewards = 1 + (MAX_REWARD - 1) * table.sigmoid()
        targets = 1 + (MAX_REWARD - 1) * (torch.tensor([9.0, 2.0]) - 1) / 9
        losses = (rewards - targets).square()
    moments = {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
    of_logits = {"logit_mean": float(table.mean()), "logit_std": float(table.std())}
    assert_same_row(rows(root / f"rm_{loss}")[-1], {"eval_loss": float(losses.mean()), **moments})
    assert_same_row(json.loads((best / "run.json").read_text())["reward"], {**of_logits, **moments})


# PPO


class PpoOracle:
    """What PPO makes of given responses: its updates, and what it logs for each rollout."""

    def __init__(self, sft, rm):
        self.policy, self.reference = (plain(AutoModelForCausalLM, sft) for _ in range(2))
        self.reward_model, critic = (plain(AutoModelForSequenceClassification, rm) for _ in "12")
        self.trunk, self.head = critic.transformer, nn.Linear(32, 1, dtype=torch.float64)
        mean_reward = json.loads((rm / "run.json").read_text())["reward"]["reward_mean"]
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, mean_reward)
        groups = self.policy.parameters(), [*self.trunk.parameters(), *self.head.parameters()]
        self.optimizers = [torch.optim.Adam(group, eps=1e-8) for group in groups]
        tokenizer = AutoTokenizer.from_pretrained(sft)
        self.eos = tokenizer.eos_token_id
        self.early_end = [self.eos, tokenizer("</response>").input_ids[0]]
        self.updates, self.rows = [], []

    def forward(self, prompt, response, kept):  # logits (R, V), values (R,)
        logits = logits_of(self.policy, prompt, response) / PPO.temperature
        states = self.trunk(torch.tensor([prompt + response])).last_hidden_state[0]
        values = self.head(states[len(prompt) - 1 : -1]).squeeze(-1)
        return logits.masked_fill(~kept, -torch.inf), values

    def judge(self, prompt, response):
        """One response, before the updates: what of it stays fixed, token by token."""
        free_logits = logits_of(self.policy, prompt, response) / PPO.temperature
        logits = free_logits.clone()
        logits[: PPO.min_gen_len, self.early_end] = -torch.inf
        kept = TopP(PPO.top_p)(None, TopK(PPO.top_k)(None, logits)).isfinite()  # what was possible
        logits, values = self.forward(prompt, response, kept)
        logprobs = token_logprobs(logits, response)
        ref_logits = logits_of(self.reference, prompt, response) / PPO.temperature
        kl = logprobs - token_logprobs(ref_logits, response)
        penalties = -PPO.beta * kl.clamp(-PPO.max_kl_div, PPO.max_kl_div)
        logit = self.reward_model(torch.tensor([prompt + response])).logits[0, 0]
        score = 1 + (PPO.max_reward - 1) * logit.sigmoid()
        score = score - PPO.missing_eos_penalty * (response[-1] != self.eos)
        rewards = torch.cat((penalties[:-1], penalties[-1:] + score))
        next_values = torch.cat((values[1:], values.new_zeros(1)))
        deltas = rewards + PPO.gamma * next_values - values
        decay = PPO.gamma * PPO.gae_lambda
        powers = decay ** torch.arange(len(deltas), dtype=torch.float64)
        sums = [(powers[: len(deltas) - t] * deltas[t:]).sum() for t in range(len(deltas))]
        advantages = torch.stack(sums)  # GAE as the sum that it stands for
        per_token = {
            "logprobs": logprobs,
            "kl": kl,
            "penalties": penalties,
            "values": values,
            "advantages": advantages,
            "returns": advantages + values,
            "entropy": torch.special.entr(logits.softmax(-1)).sum(-1),
            "kept_mass": (free_logits.softmax(-1) * kept).sum(-1),
        }
        facts = {"prompt": prompt, "response": response, "kept": kept, "score": score}
        return SimpleNamespace(**facts, **per_token, per_token=per_token)

    def rollout(self, step, prompts, responses):
        """Everything that follows from the responses of one rollout."""
        with torch.no_grad():
            judged = [self.judge(*both) for both in zip(prompts, responses, strict=True)]
        flat = {
            name: torch.cat([x.per_token[name] for x in judged]) for name in judged[0].per_token
        }
        for x in judged:
            spread = (flat["advantages"].var() + 1e-8).sqrt()
            x.advantages = (x.advantages - flat["advantages"].mean()) / spread
        rate, seen, num = PPO.learning_rate * (1 - len(self.updates) / PPO_STEPS), [], len(judged)
        for inner_epoch in range(PPO.num_inner_epoch):
            order = random.Random(f"42/{step}/{inner_epoch}").sample(range(num), num)
            parts = order[: PPO.minibatch_size], order[PPO.minibatch_size :]
            seen += [self.update([judged[i] for i in part]) for part in parts]
        means = {name: sum(terms[name] for terms in seen) / len(seen) for name in seen[0]}
        errors = flat["returns"] - flat["values"]
        scores, penalties = sum(x.score for x in judged), flat["penalties"].sum()
        figures = {
            **means,
            "objective/kl": flat["kl"].sum() / num,
            "objective/kl_k3": (torch.exp(-flat["kl"]) - 1 + flat["kl"]).sum() / num,
            "objective/entropy": -flat["logprobs"].sum() / num,
            "objective/scores": scores / num,
            "objective/non_score_reward": penalties / num,
            "objective/rlhf_reward": (scores + penalties) / num,
            "policy/entropy_avg": flat["entropy"].mean(),
            "kept_mass": flat["kept_mass"].mean(),
            "val/num_eos_tokens": sum(x.response[-1] == self.eos for x in judged),
            "response_length": len(errors) / num,
            "guarded_kl": (flat["kl"].abs() > PPO.max_kl_div).double().mean(),
            "explained_variance": 1 - errors.var() / flat["returns"].var(),
            "lr": rate,
        }
        self.rows.append({name: float(figure) for name, figure in figures.items()})

    def update(self, minibatch):
        """One step on the mean over the tokens of a minibatch."""
        terms = []
        for x in minibatch:
            logits, values = self.forward(x.prompt, x.response, x.kept)
            log_ratio = token_logprobs(logits, x.response) - x.logprobs
            ratio = log_ratio.exp()
            free = ratio * x.advantages
            clipped = ratio.clamp(1 - PPO.epsilon, 1 + PPO.epsilon) * x.advantages
            moved = x.values + (values - x.values).clamp(-PPO.value_clip, PPO.value_clip)
            error, moved_error = (values - x.returns).square(), (moved - x.returns).square()
            term = {
                "loss/policy_avg": -torch.minimum(free, clipped),
                "loss/value_avg": torch.maximum(error, moved_error) / 2,
                "policy/clipfrac_avg": (clipped < free).double(),
                "policy/approxkl_avg": log_ratio.square() / 2,
                "val/ratio": ratio,
                "val/clipfrac_avg": (moved_error > error).double(),
            }
            terms.append(term)
        means = {name: torch.cat([term[name] for term in terms]).mean() for name in terms[0]}
        (means["loss/policy_avg"] + PPO.value_loss_coeff * means["loss/value_avg"]).backward()
        rate = PPO.learning_rate * (1 - len(self.updates) / PPO_STEPS)
        update, norm = step_all(self.optimizers, rate, PPO.max_gradient_norm)
        self.updates.append(update)
        return {**{name: mean.item() for name, mean in means.items()}, "grad_norm": norm}


@pytest.fixture(scope="module")
def ppo(root, data_dir):
    """Two rollouts of run_ppo.py, and what the oracle makes of the same responses."""
    rollouts, roll_out = [], run_ppo.roll_out

    def watched(*args, **options):
        rollout = roll_out(*args, **options)
        batch = rollout.batch
        masked = zip(batch.prompt_ids, batch.prompt_mask, strict=True)
        rollouts.append(([ids[mask].tolist() for ids, mask in masked], rollout.responses()))
        return rollout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_ppo, "roll_out", watched)
        updates = watch_updates(patch, run_ppo)
        rm = root / "rm_regression/best"
        folder = run("ppo", root, data_dir, f"--rm_model_path={rm}", *flags(PPO))
    oracle = PpoOracle(root / "sft/best", rm)
    for step, (prompts, responses) in enumerate(rollouts[1:-1], start=1):  # the ends: held-out
        oracle.rollout(step, prompts, responses)
    logged = [row for row in rows(folder) if "val/ratio" in row]
    return SimpleNamespace(updates=updates, rows=logged, oracle=oracle)


def test_the_ppo_run_has_every_kind_of_token(ppo):
    shares = ("policy/clipfrac_avg", "val/clipfrac_avg", "guarded_kl", "kept_mass")
    for name in shares:
        assert 0 < sum(row[name] for row in ppo.oracle.rows) / 2 < 1, name
    assert 0 < sum(row["val/num_eos_tokens"] for row in ppo.oracle.rows) < PPO.max_samples
    assert all(float(gradient.norm()) > 0 for update in ppo.updates for _, gradient in update)


@pytest.mark.claim(10, 13, 14, 15, 16, 17, 18, 26)
def test_gradients_and_learning_rates_of_ppo_are_those_of_the_formulas(ppo):
    assert_same_updates(ppo.updates, ppo.oracle.updates)


@pytest.mark.claim(13, 16, 17, 18, 19)
def test_ppo_logs_what_the_formulas_give(ppo):
    for row, expected in zip(ppo.rows, ppo.oracle.rows, strict=True):
        assert_same_row(row, expected)


# DPO


@pytest.fixture(scope="module")
def mixed_pairs(tmp_path_factory, data_dir):
    """Pairs of which every third one is turned round: nobody can get all of them right."""
    root = tmp_path_factory.mktemp("mixed")
    for side in ("train", "eval"):
        lines = (data_dir / f"pref/{side}.jsonl").read_text().splitlines()
        pairs = [json.loads(line) for line in lines]
        for pair in pairs[::3]:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        write_jsonl(root / f"pref/{side}.jsonl", pairs)
    return root


def preference_terms(policy, reference, pair):
    """The terms of one pair of (prompt, response) ids."""
    chosen, rejected = (token_logprobs(logits_of(policy, *x), x[1]).sum() for x in pair)
    with torch.no_grad():
        ref = [token_logprobs(logits_of(reference, *x), x[1]).sum() for x in pair]
    rewards = DPO.beta * (chosen - ref[0]), DPO.beta * (rejected - ref[1])
    return {
        "loss": -logsigmoid(rewards[0] - rewards[1]),
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).double(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


@pytest.mark.claim(21, 23, 26)
def test_dpo_run_equals_its_formulas(root, mixed_pairs, tmp_path, monkeypatch):
    updates = watch_updates(monkeypatch, run_dpo)
    *logged, evaluated = rows(run("dpo", root, mixed_pairs, *flags(DPO), ckpt_dir=tmp_path))[1:]
    tokenizer = AutoTokenizer.from_pretrained(root / "sft/best")
    pairs = {}
    for side in ("train", "eval"):
        records = map(json.loads, (mixed_pairs / f"pref/{side}.jsonl").read_text().splitlines())
        sides = ("chosen", "rejected")
        pairs[side] = [[encode(tokenizer, r["prompt"], r[x]) for x in sides] for r in records]
    policy, reference = (plain(AutoModelForCausalLM, root / "sft/best") for _ in range(2))

    def means(some):
        terms = [preference_terms(policy, reference, pair) for pair in some]
        return {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}

    optimizer, expected = torch.optim.Adam(policy.parameters(), eps=1e-8), []
    lengths = [max(len(prompt + response) for prompt, response in pair) for pair in pairs["train"]]
    plan = epoch_order(lengths, DPO.batch_size, seed=42, epoch=1)
    for step, (batch, row) in enumerate(zip(plan, logged, strict=True)):
        terms = means(pairs["train"][i] for i in batch)
        terms["loss"].backward()
        rate = DPO.learning_rate * (len(plan) - step) / len(plan)
        update, norm = step_all([optimizer], rate, 1.0)
        expected.append(update)
        if step == 0:  # equal rewards, up to rounding: any accuracy may come out
            del terms["rewards/accuracies"]
        figures = {name: figure.item() for name, figure in terms.items()}
        assert_same_row(row, {**figures, "grad_norm": norm, "lr": rate})
    assert_same_updates(updates, expected)
    heldout = {f"eval_{name}": mean.item() for name, mean in means(pairs["eval"]).items()}
    assert 0 < heldout["eval_rewards/accuracies"] < 1
    assert_same_row(evaluated, heldout)
