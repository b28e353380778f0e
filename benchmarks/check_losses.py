"""Our losses and advantages against TRL's own code, on random models and rows.

    pip install -r requirements.txt -r benchmarks/requirements.txt -c constraints.txt
    python benchmarks/check_losses.py

Every line builds a trainer of TRL around a small random model, and lets the trainer's own method
compute its loss or its advantages from its own batch. Ours are computed from the same weights and
rows by the package. Several sizes and seeds, every row of another length. Exits with 1 if one is
off by more than 1e-5 (relative, where it is above 1).
"""

import copy
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
import trl
from datasets import disable_progress_bars
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils.logging import set_verbosity_error

from benchmarks.measuring import EOS, Pair
from benchmarks.peers_trl import COLUMNS, build_trainer
from rlhf.advantages import dr_grpo, grpo, rloo, token_rewards
from rlhf.batches import Batch, build_batch
from rlhf.heads import head_of
from rlhf.logprobs import sequence_logprobs, token_logprobs
from rlhf.losses import (
    cdpo_loss,
    centering_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    margin_reward_loss,
    pairwise_reward_loss,
    ppo_policy_loss,
    simpo_loss,
)
from rlhf.markdown import markdown_table
from rlhf.masked import masked_mean
from rlhf.models import response_states, reward_logits
from rlhf.tokens import Sample

TOLERANCE = 1e-5
BETA, LABEL_SMOOTHING, SFT_COEFF, SIMPO_GAMMA = 0.3, 0.15, 0.7, 0.6
CENTER_COEFF, EPSILON, GROUP = 0.4, 0.2, 4
WITHOUT = {  # ours, to which TRL 1.16 has nothing
    "listwise reward loss": "its RewardTrainer takes one pair of each prompt",
    "rrhf_loss": "no trainer of it ranks scored responses",
    "gae, value_loss, masked_whiten, adaptive_beta": "its PPO trainer was removed",
}


class Case(NamedTuple):
    """Random models, and rows of random lengths."""

    seed: int
    num_rows: int
    max_tokens: int  # of a prompt, and of a response

    def model(self, kind: type = LlamaForCausalLM, offset: int = 0) -> Any:
        """Build a model whose weights are large enough to have opinions.

        Its positions are relative: TRL's online trainers pad prompts on the left and pass no
        position ids, which moves the logits of a GPT-2.
        """
        torch.manual_seed(100 * self.seed + offset)
        size = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
        size |= {"num_attention_heads": 2, "vocab_size": EOS + 1, "num_labels": 1}
        tokens = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
        return kind(LlamaConfig(**size, **tokens, initializer_range=0.3)).eval()

    def pairs(self) -> list[Pair]:
        rng = random.Random(self.seed)

        def ids() -> list[int]:
            return [rng.randrange(1000) for _ in range(rng.randint(1, self.max_tokens))]

        prompts = [ids() for _ in range(self.num_rows)]
        return [(Sample(p, [*ids(), EOS]), Sample(p, [*ids(), EOS])) for p in prompts]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))


CASES = [Case(seed, rows, tokens) for rows, tokens in ((2, 4), (8, 20)) for seed in (1, 2, 3)]
Check = Callable[[Case], tuple[Tensor, Tensor]]  # ours, TRL's


def logprobs_of(model: Any, batch: Batch) -> Tensor:  # (B, R)
    states, mask = response_states(model, batch), batch.response_mask
    return token_logprobs(states, batch.response_ids, mask, head_of(model), temperature=1.0)


def both_logprobs(model: Any, pairs: list[Pair]) -> tuple[Tensor, Tensor]:  # (2, B), (2, B)
    """Log-probabilities of chosen and of rejected responses, and how many tokens each has."""
    batch = build_batch([pair[side] for side in (0, 1) for pair in pairs], EOS)
    sums = sequence_logprobs(logprobs_of(model, batch), batch.response_mask)
    return sums.view(2, -1), batch.response_mask.sum(dim=1).view(2, -1)


def trl_dpo(case: Case, pairs: list[Pair], **settings: Any) -> Tensor:
    """The loss of TRL's DPOTrainer."""
    parts = {"settings": {"beta": BETA, **settings}, "ref_model": case.model(offset=1)}
    trainer = build_trainer("DPO", case.model(), COLUMNS["dpo"], **parts)
    rows = [
        {"prompt_ids": c.prompt_ids, "chosen_ids": c.response_ids, "rejected_ids": r.response_ids}
        for c, r in pairs
    ]
    return trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))


def by_reference(loss: Callable[..., Tensor], loss_type: str, *, means: bool = False) -> Check:
    """Compare a loss of four logprobs."""

    def check(case: Case) -> tuple[Tensor, Tensor]:
        pairs = case.pairs()
        (policy, lengths), (ref, _) = (both_logprobs(case.model(offset=i), pairs) for i in (0, 1))
        four = [*(policy / lengths), *(ref / lengths)] if means else [*policy, *ref]
        return loss(*four, beta=BETA).mean(), trl_dpo(case, pairs, loss_type=[loss_type])

    return check


def check_cdpo(case: Case) -> tuple[Tensor, Tensor]:
    """TRL's DPO smooths labels in `aot`, which sorts a batch: of one pair it is cDPO."""
    ours, theirs = [], []
    for pair in case.pairs():
        (policy, _), (ref, _) = (both_logprobs(case.model(offset=i), [pair]) for i in (0, 1))
        ours.append(cdpo_loss(*policy, *ref, beta=BETA, label_smoothing=LABEL_SMOOTHING)[0])
        settings = {"loss_type": ["aot"], "label_smoothing": LABEL_SMOOTHING}
        theirs.append(trl_dpo(case, [pair], **settings))
    return torch.stack(ours), torch.stack(theirs)


def check_sft_term(case: Case) -> tuple[Tensor, Tensor]:
    """TRL averages over the tokens of a batch, ours over pairs: of one pair they are the same."""
    ours, theirs = [], []
    for pair in case.pairs():
        (policy, lengths), (ref, _) = (both_logprobs(case.model(offset=i), [pair]) for i in (0, 1))
        nll = -(policy / lengths)[0]
        ours.append((dpo_loss(*policy, *ref, beta=BETA) + SFT_COEFF * nll)[0])
        settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, SFT_COEFF]}
        theirs.append(trl_dpo(case, [pair], **settings))
    return torch.stack(ours), torch.stack(theirs)


def check_simpo(case: Case) -> tuple[Tensor, Tensor]:
    pairs = case.pairs()
    policy, lengths = both_logprobs(case.model(), pairs)
    ours = simpo_loss(*(policy / lengths), beta=BETA, simpo_gamma=SIMPO_GAMMA).mean()
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": SIMPO_GAMMA, "beta": BETA}
    home = "trl.experimental.cpo"
    trainer = build_trainer("CPO", case.model(), COLUMNS["dpo"], module=home, settings=settings)
    rows = []
    for pair in pairs:
        row: dict[str, list[int]] = {}
        for name, sample in zip(("chosen", "rejected"), pair, strict=True):
            row[f"{name}_input_ids"] = [*sample.prompt_ids, *sample.response_ids]
            row[f"{name}_labels"] = [-100] * len(sample.prompt_ids) + sample.response_ids
            row[f"{name}_attention_mask"] = [1] * len(row[f"{name}_labels"])
        rows.append(row)
    return ours, trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))


def check_reward(case: Case, *, margin: bool, center: bool) -> tuple[Tensor, Tensor]:
    pairs, margins = case.pairs(), case.normal(case.num_rows).abs()
    model = case.model(LlamaForSequenceClassification)
    chosen, rejected = (
        reward_logits(model, build_batch([pair[side] for pair in pairs], EOS), pad_id=EOS)
        for side in (0, 1)
    )
    if margin:
        losses = margin_reward_loss(chosen, rejected, margins)
    else:
        losses = pairwise_reward_loss(chosen, rejected)
    if center:
        losses = losses + CENTER_COEFF * centering_loss(chosen, rejected)
    settings = {"center_rewards_coefficient": CENTER_COEFF} if center else {}
    trainer = build_trainer("Reward", copy.deepcopy(model), COLUMNS["rm"], settings=settings)
    rows = [
        {
            "chosen_ids": [*c.prompt_ids, *c.response_ids],
            "rejected_ids": [*r.prompt_ids, *r.response_ids],
            **({"margin": float(m)} if margin else {}),
        }
        for (c, r), m in zip(pairs, margins, strict=True)
    ]
    return losses.mean(), trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))


class Rollout(NamedTuple):
    """Responses and their scores: GROUP to each prompt, side by side."""

    samples: list[Sample]
    scores: Tensor  # (B,)

    @property
    def batch(self) -> Batch:
        return build_batch(self.samples, EOS)


def draw_rollout(case: Case) -> Rollout:
    samples = [
        pair[side]._replace(prompt_ids=first.prompt_ids)
        for first, _ in case.pairs()
        for pair in Case(case.seed + 10, GROUP // 2, case.max_tokens).pairs()
        for side in (0, 1)
    ]
    return Rollout(samples, 3 * case.normal(len(samples)))


def online_trainer(kind: str, case: Case, rollout: Rollout, **settings: Any) -> Any:
    """Build a trainer whose responses and scores are the rollout's."""

    def reward(**_: Any) -> list[float]:
        return rollout.scores.tolist()

    usual = {"num_generations": GROUP, "per_device_train_batch_size": len(rollout.samples)}
    usual |= {"epsilon": EPSILON, "beta": 0.0}
    trainer = build_trainer(
        kind, case.model(), ["prompt"], settings={**usual, **settings}, reward_funcs=reward
    )
    written = [[list(ids) for ids in column] for column in zip(*rollout.samples, strict=True)]
    texts = ["x"] * len(rollout.samples)
    # GRPO's also tells of tools, the sampler's logprobs, further columns and pictures.
    results = {
        "GRPO": (*written, None, texts, None, {}, None, None),
        "RLOO": (*written, texts),
    }
    trainer._generate = lambda prompts: results[kind]
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which is not called
    return trainer


def check_grpo_advantages(case: Case, *, scale_rewards: str) -> tuple[Tensor, Tensor]:
    rollout = draw_rollout(case)
    rollout.scores[:GROUP] = 1.7  # a group in which nothing can be compared
    ours = {"group": grpo, "none": dr_grpo}[scale_rewards](rollout.scores.view(-1, GROUP))
    trainer = online_trainer("GRPO", case, rollout, scale_rewards=scale_rewards)
    trainer.model.train()  # in evaluation it compares groups of another size
    rows = [{"prompt": "x"} for _ in rollout.samples]
    return ours.flatten(), trainer._generate_and_score_completions(rows)["advantages"]


def check_rloo_advantages(case: Case) -> tuple[Tensor, Tensor]:
    """With the KL penalty in the reward, as ours has it."""
    rollout, reference = draw_rollout(case), case.model(offset=1)
    mask = rollout.batch.response_mask
    kl = logprobs_of(case.model(), rollout.batch) - logprobs_of(reference, rollout.batch)
    rewards = token_rewards(rollout.scores, kl, mask, beta=BETA, max_kl_div=1e9)
    ours = rloo(rewards.sum(dim=1).view(-1, GROUP)).flatten()
    trainer = online_trainer("RLOO", case, rollout)
    # The reference that it would make by itself is the model as it stands on the Hub.
    trainer.beta, trainer.ref_model = BETA, copy.deepcopy(trainer.model)
    trainer.ref_model.load_state_dict(reference.state_dict())
    trainer.model.train()
    rows = [{"prompt": "x"} for _ in rollout.samples]
    return ours, trainer._generate_and_score_completions(rows)["advantages"]


def check_clipped_loss(case: Case, *, kind: str) -> tuple[Tensor, Tensor]:
    """The old logprobs lie around the new ones, so that some ratios are clipped."""
    rollout = draw_rollout(case)
    batch = rollout.batch
    mask = batch.response_mask
    logprobs = logprobs_of(case.model(), batch)  # (B, R)
    old = torch.where(mask, logprobs + 0.3 * case.normal(*logprobs.shape), 0.0).detach()
    inputs = {
        "prompt_ids": batch.prompt_ids,
        "prompt_mask": batch.prompt_mask.long(),
        "completion_ids": batch.response_ids,
        "completion_mask": mask.long(),
    }
    if kind == "RLOO":  # clips the ratio of a whole response
        settings: dict[str, Any] = {}
        sums, old_sums = (sequence_logprobs(x, mask) for x in (logprobs, old))
        ours = ppo_policy_loss(sums, old_sums, rollout.scores, epsilon=EPSILON).mean()
        inputs |= {"old_logps": old_sums, "advantages": rollout.scores}
    else:
        settings = {"loss_type": "bnpo"}  # the mean over tokens; `grpo` averages within responses
        advantages = rollout.scores[:, None].expand_as(logprobs)
        if kind == "PPO":  # an advantage for each token
            advantages = 2 * case.normal(*logprobs.shape).flip(1)
        ours = masked_mean(ppo_policy_loss(logprobs, old, advantages, epsilon=EPSILON), mask)
        inputs |= {"old_per_token_logps": old, "advantages": advantages}
    trainer = online_trainer("RLOO" if kind == "RLOO" else "GRPO", case, rollout, **settings)
    return ours, trainer._compute_loss(trainer.model.eval(), inputs)


CHECKS: dict[str, tuple[str, Check]] = {
    "dpo_loss": ("DPOTrainer, sigmoid", by_reference(dpo_loss, "sigmoid")),
    "cdpo_loss": ("DPOTrainer, aot, one pair", check_cdpo),
    "ipo_loss": ("DPOTrainer, ipo", by_reference(ipo_loss, "ipo", means=True)),
    "hinge_loss": ("DPOTrainer, hinge", by_reference(hinge_loss, "hinge")),
    "dpo_loss + SFT term": ("DPOTrainer, sigmoid + sft, one pair", check_sft_term),
    "simpo_loss": ("experimental CPOTrainer, simpo", check_simpo),
    "pairwise_reward_loss": (
        "RewardTrainer",
        lambda case: check_reward(case, margin=False, center=False),
    ),
    "margin_reward_loss": (
        "RewardTrainer, margin",
        lambda case: check_reward(case, margin=True, center=False),
    ),
    "margin + centering_loss": (
        "RewardTrainer, margin, center_rewards_coefficient",
        lambda case: check_reward(case, margin=True, center=True),
    ),
    "grpo": (
        "GRPOTrainer, scale_rewards=group",
        lambda case: check_grpo_advantages(case, scale_rewards="group"),
    ),
    "dr_grpo": (
        "GRPOTrainer, scale_rewards=none",
        lambda case: check_grpo_advantages(case, scale_rewards="none"),
    ),
    "token_rewards, rloo": ("RLOOTrainer, beta", check_rloo_advantages),
    "ppo_policy_loss, tokens": (
        "GRPOTrainer, bnpo, advantages (B, R)",
        lambda case: check_clipped_loss(case, kind="PPO"),
    ),
    "ppo_policy_loss, groups": (
        "GRPOTrainer, bnpo",
        lambda case: check_clipped_loss(case, kind="GRPO"),
    ),
    "ppo_policy_loss, whole responses": (
        "RLOOTrainer",
        lambda case: check_clipped_loss(case, kind="RLOO"),
    ),
}


def largest_difference(check: Check) -> float:
    """Over all cases, relative where TRL's number is above 1."""
    found = []
    for case in CASES:
        ours, theirs = (x.detach().double() for x in check(case))
        if ours.shape != theirs.shape:
            raise ValueError(f"{case}: ours {tuple(ours.shape)}, TRL's {tuple(theirs.shape)}")
        found.append(float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max()))
    return max(found)


def main() -> int:
    set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's, about transformers' names
    rows, passed = [["ours", "TRL's", "largest difference", ""]], True
    for name, (theirs, check) in CHECKS.items():
        difference = largest_difference(check)
        is_same = difference <= TOLERANCE  # False for nan too
        passed &= is_same
        rows.append([name, theirs, f"{difference:.1e}", "ok" if is_same else "NOT"])
    print(f"TRL {trl.__version__}, transformers {transformers.__version__}\n")
    print(f"{markdown_table(rows)}\n\nWithout a counterpart in TRL:")
    for name, reason in WITHOUT.items():
        print(f"- {name}: {reason}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
