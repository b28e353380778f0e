"""Rewards: fixed scales, centred logits, and functions that are told what they did wrong."""

import builtins
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.batches import Batch, Room, build_batch
from rlhf.errors import InputError, RunError
from rlhf.models import load_reward_model, reward_logits
from rlhf.rewards import (
    RewardFacts,
    ScoreScale,
    merged_moments,
    normalized_scores,
    pairwise_reward,
    read_reward_facts,
    regression_reward,
    score_by_function,
    score_by_model,
    stored_scale,
    target_rewards,
)
from rlhf.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "float32", "")
FACTS = {"loss": "regression", "max_reward": 5.0, "logit_mean": 0.5, "reward_mean": 3.25}


@pytest.mark.claim(6)
def test_scores_are_mapped_by_the_fixed_scale_and_never_by_those_that_are_there():
    # UltraFeedback's scale is 1 to 10: 1 + 4 * (score - 1) / 9.
    scale = (1.0, 10.0)
    targets = target_rewards([1.0, 4.0, 10.0], scale=scale, max_reward=5.0)
    assert targets.tolist() == pytest.approx([1.0, 1 + 4 / 3, 5.0])
    # A split without a 10: the same score has the same target, alone and in any company.
    assert target_rewards([4.0], scale=scale, max_reward=5.0).tolist() == [targets[1].item()]
    assert target_rewards([2.0, 4.0], scale=scale, max_reward=5.0)[1] == targets[1]


@pytest.mark.claim(6)
def test_targets_follow_scale_and_max_reward():
    targets = target_rewards([0, 50, 100], scale=(0.0, 100.0), max_reward=3.0)
    assert targets.tolist() == [1.0, 2.0, 3.0] and targets.dtype == torch.float32


@pytest.mark.claim(6)
def test_regression_reward_lies_between_one_and_max_reward():
    # sigmoid(ln 3) = 3/4: 1 + 4 * 0.75 = 4, and 2 on the other side.
    logits = torch.tensor([-1e4, -math.log(3), 0.0, math.log(3), 1e4])
    rewards = regression_reward(logits, max_reward=5.0)
    torch.testing.assert_close(rewards, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert regression_reward(torch.tensor([0.0]), max_reward=2.0).item() == 1.5


@pytest.mark.claim(6)
def test_pairwise_reward_is_the_centred_logit_with_a_guard_on_both_sides():
    logits = torch.tensor([-99.0, -1.5, 0.5, 4.5, 99.0])
    rewards = pairwise_reward(logits, logit_mean=0.5, max_reward=5.0)
    assert rewards.tolist() == [-5.0, -2.0, 0.0, 4.0, 5.0]


@pytest.mark.claim(6)
def test_pairwise_reward_forgets_the_offset_that_its_loss_leaves_free():
    logits = torch.tensor([-1.0, 2.0])
    rewards = pairwise_reward(logits, logit_mean=0.5, max_reward=5.0)
    moved = pairwise_reward(logits + 100, logit_mean=100.5, max_reward=5.0)
    assert torch.equal(rewards, moved)
    assert rewards[1] - rewards[0] == logits[1] - logits[0]  # no sigmoid in between


@pytest.mark.claim(6)
def test_a_model_scores_by_the_formula_that_its_run_json_names(base_path, samples):
    torch.manual_seed(3)
    model = load_reward_model(base_path, flag="--x", device=CPU.device, pad_id=0)
    batch, ended = build_batch(samples, 0), torch.tensor([True, True, False])
    with torch.no_grad():
        logits = reward_logits(model, batch, pad_id=0)
    assert logits.std() > 0.01
    expected = {"regression": 1 + 4 / (1 + torch.exp(-logits)), "pairwise": logits - 0.5}
    expected["listwise"] = expected["pairwise"]
    for loss, rewards in expected.items():
        facts = RewardFacts(**(FACTS | {"loss": loss}))
        for size in (0, 1, 2):
            score = score_by_model(model, facts, runtime=CPU)
            scores = score(["p"] * 3, ["r"] * 3, batch, ended, Room(size))
            torch.testing.assert_close(scores, rewards, atol=1e-5, rtol=0)
            assert not scores.requires_grad


def test_reward_facts_are_read_from_run_json():
    run = {"stage": "rm", "reward": {**FACTS, "reward_std": 0.1, "num_ties": 3}}
    facts = read_reward_facts(run, path="rm/best", max_reward=5.0)
    assert facts == RewardFacts(**FACTS, reward_std=0.1)


def test_a_checkpoint_without_a_spread_serves_where_it_is_not_asked_for():
    facts = read_reward_facts({"reward": FACTS}, path="rm/best", max_reward=5.0)
    assert facts == RewardFacts(**FACTS, reward_std=None)
    for std in (None, 0.0, math.nan):
        with pytest.raises(InputError, match=r"--normalize_reward=stored: .*=rm/best .*running$"):
            stored_scale(facts._replace(reward_std=std), path="rm/best")


@pytest.mark.parametrize(
    "run", [{}, {"reward": None}, {"reward": {"loss": "regression"}}, {"reward": [1, 2]}]
)
def test_a_checkpoint_without_reward_facts_is_refused(run):
    with pytest.raises(InputError, match=r"--rm_model_path=rm/best.*run_rm\.py"):
        read_reward_facts(run, path="rm/best", max_reward=5.0)


@pytest.mark.parametrize(
    "change", [{"loss": "other"}, {"max_reward": "5"}, {"logit_mean": None}, {"reward_mean": None}]
)
def test_reward_facts_that_cannot_be_used_are_refused(change):
    with pytest.raises(InputError, match="tells no usable reward"):
        read_reward_facts({"reward": FACTS | change}, path="rm/best", max_reward=5.0)


def test_max_reward_must_be_the_reward_models_own():
    with pytest.raises(InputError, match=r"--max_reward=4.*--rm_model_path=rm/best.* 5$"):
        read_reward_facts({"reward": FACTS}, path="rm/best", max_reward=4.0)


# Units


def test_scores_are_left_alone_bit_for_bit_where_no_units_are_asked_for():
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ScoreScale()(scores), scores)


def test_stored_units_are_the_reward_models_own():
    facts = RewardFacts(**{**FACTS, "reward_mean": 3.25}, reward_std=0.5)
    scale = stored_scale(facts, path="rm/best")
    # (4.25 - 3.25) / 0.5 and (3 - 3.25) / 0.5
    scores = scale(torch.tensor([4.25, 3.0]))
    assert scores.tolist() == [2.0, -0.5] and scores.dtype == torch.float32
    assert normalized_scores(*torch.tensor([[7.0], [1.0], [3.0]])).item() == 2.0
    assert float(scale.std) == 0.5


def test_running_units_are_mean_and_unbiased_deviation_of_all_scores():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(1e4, 0.5, size) for size in (1, 7, 2, 64)]  # far from 0: cancellation
    scale = ScoreScale()
    for i in range(len(chunks)):
        scale.learn(torch.tensor(chunks[i]))
        seen = np.concatenate(chunks[: i + 1])
        assert float(scale.mean) == pytest.approx(seen.mean(), rel=1e-12)
        if len(seen) > 1:
            assert float(scale.std) == pytest.approx(seen.std(ddof=1), rel=1e-9)
    assert int(scale.num) == 74


def test_moments_worked_by_hand():
    # 1 and 3 have mean 2 and variance 2; with 8 and 4: mean 4, (9 + 1 + 16 + 0) / 3.
    before = torch.tensor(2), torch.tensor(2.0), torch.tensor(2.0)
    moments = merged_moments(*before, torch.tensor([8.0, 4.0]))
    assert [float(x) for x in moments] == pytest.approx([4.0, 4.0, 26 / 3])


def test_equal_scores_do_not_blow_up():
    scale = ScoreScale()
    for _ in range(3):
        scores = torch.full((5,), 0.1)
        scale.learn(scores)
        assert scale(scores).abs().max() < 1e-6
    # A single first score has no spread either.
    alone = ScoreScale()
    alone.learn(torch.tensor([7.0]))
    assert alone(torch.tensor([7.0])).item() == 0.0


# Reward functions


def write_module(folder: Path, source: str) -> str:
    path = folder / "my_reward.py"
    path.write_text(source, encoding="utf-8")
    return str(path)


def call(spec: str, prompts: list[str], responses: list[str], ended: list[bool]) -> torch.Tensor:
    unused: Any = None
    batch: Batch = unused  # a function sees text only
    return score_by_function(spec)(prompts, responses, batch, torch.tensor(ended), Room(0))


LENGTHS = """
import math

BONUS = 1

def helper(text):
    return math.floor(len(text)) + BONUS

def length(prompts, responses):
    return [helper(p) + 10 * len(r) for p, r in zip(prompts, responses)]
"""


def test_a_function_is_taken_from_a_file(tmp_path):
    spec = f"{write_module(tmp_path, LENGTHS)}:length"
    scores = call(spec, ["ab", "c"], ["x", "yz"], [True, False])
    assert scores.tolist() == [13.0, 22.0] and scores.dtype == torch.float32


def test_a_function_is_taken_from_a_module(tmp_path, monkeypatch):
    write_module(tmp_path, LENGTHS)
    monkeypatch.syspath_prepend(tmp_path)
    assert call("my_reward:length", ["ab"], ["x"], [True]).tolist() == [13.0]


def test_a_function_that_tells_nothing_of_its_arguments_is_given_two():
    assert call("builtins:max", ["1"], ["2"], [True]).tolist() == [2.0]


def test_the_path_of_a_file_may_hold_colons(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert call(f"{write_module(folder, LENGTHS)}:length", ["ab"], ["x"], [True]).tolist() == [13]


def test_a_file_is_imported_and_not_run(tmp_path):
    path = write_module(tmp_path, f"{LENGTHS}\nif __name__ == '__main__':\n    raise ValueError\n")
    assert call(f"{path}:length", ["ab"], ["x"], [True]).tolist() == [13.0]


def test_a_function_learns_which_responses_ended_if_it_asks(tmp_path):
    source = """
def asks(prompts, responses, ended):
    assert all(type(value) is bool for value in ended)
    return [float(value) for value in ended]

def does_not(prompts, responses):
    return [7.0 for prompt in prompts]
"""
    path = write_module(tmp_path, source)
    two = (["p", "q"], ["r", "s"], [True, False])
    assert call(f"{path}:asks", *two).tolist() == [1.0, 0.0]
    assert call(f"{path}:does_not", *two).tolist() == [7.0, 7.0]


def test_whoever_fails_is_told_whether_its_response_ended(tmp_path):
    source = "def f(prompts, responses, ended):\n    return [1 / end for end in ended]\n"
    path = write_module(tmp_path, source)
    with pytest.raises(RunError, match=r"raised ZeroDivisionError: .* for the prompt 'q'"):
        call(f"{path}:f", ["p", "q"], ["r", "s"], [True, False])


def test_a_function_may_return_booleans(tmp_path):
    path = write_module(tmp_path, "def f(prompts, responses):\n    return [True, False]\n")
    assert call(f"{path}:f", ["p", "q"], ["r", "s"], [True] * 2).tolist() == [1.0, 0.0]


def test_a_function_may_return_a_tensor_or_whole_numbers(tmp_path):
    path = write_module(
        tmp_path,
        "import torch\ndef f(prompts, responses):\n    return torch.arange(2)\n",
    )
    assert call(f"{path}:f", ["p", "q"], ["r", "s"], [True] * 2).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"returned 1 numbers for 2 prompts, the first of which is 'first'"),
        ("return [1.0, 2.0, 3.0]", r"returned 3 numbers for 2 prompts, the first of which is"),
        ("return [1.0, float('nan')]", r"returned nan for the prompt 'second'"),
        ("return [float('-inf'), 1.0]", r"returned -inf for the prompt 'first'"),
        ("return [1.0, 1e300]", r"returned 1e\+300 for the prompt 'second'"),  # beyond float32
        ("return [1.0, 10**400]", r"returned 1000.* for the prompt 'second'"),
        ("return [True, None]", r"returned None for the prompt 'second'"),
        ("return ['good', 'bad']", r"returned 'good' for the prompt 'first'"),
        ("return [0, [1, 2]]", r"returned \[1, 2\] for the prompt 'second'"),
        ("return {}['x']", r"raised KeyError: 'x' \(my_reward.py line 2\) for the prompt 'first'"),
        ("return None", r"returned None for 2 prompts, the first of which is 'first'; it must"),
        (
            "return {0: 9.0, 1: 8.0}",
            r"returned \{0: 9.0, 1: 8.0\} for 2 prompts, .* a list of numbers",
        ),
        ("return '12'", r"returned '12' for 2 prompts, the first of which is 'first'"),
        ("raise SystemExit(0)", r"raised RuntimeError: SystemExit: 0 .* the prompt 'first'"),
        (
            "return [1 / ('second' not in prompts)] * len(prompts)",
            r"raised ZeroDivisionError: .* for the prompt 'second'",
        ),
        (
            "return [1 / (len(prompts) < 2)]",
            r"raised ZeroDivisionError: .* for 2 prompts at once, and for none of them alone; the"
            r" first is 'first'",
        ),
    ],
)
def test_a_function_that_fails_stops_the_run_and_names_the_prompt(body, message, tmp_path):
    path = write_module(tmp_path, f"def f(prompts, responses):\n    {body}\n")
    with pytest.raises(RunError, match=message) as caught:
        call(f"{path}:f", ["first", "second"], ["r", "s"], [True] * 2)
    assert str(caught.value).startswith(f"--reward_fn={path}:f ")


def test_a_function_of_other_arguments_is_told_which_it_gets(tmp_path):
    path = write_module(tmp_path, "def f(prompts):\n    return [1.0] * len(prompts)\n")
    with pytest.raises(RunError, match=r"TypeError: .* \(it is called with prompts and responses"):
        call(f"{path}:f", ["first"], ["r"], [True])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_reward.py", "must be file.py:function or module:function"),
        (":f", "must be file.py:function or module:function"),
        ("my_reward.py:", "must be file.py:function or module:function"),
        ("my_reward.py:missing", "my_reward.py has no function missing"),
        ("my_reward.py:NUMBER", "my_reward.py has no function NUMBER"),
        ("nowhere.py:f", "No such file or directory"),
        ("no_such_module_at_all:f", "No module named 'no_such_module_at_all'"),
        ("math:missing", "math has no function missing"),
        ("broken.py:f", "SyntaxError"),
        ("raising.py:f", "ZeroDivisionError"),
        ("leaving.py:f", "SystemExit"),
    ],
)
def test_a_function_that_cannot_be_imported_is_an_error_of_the_argument(
    spec, message, tmp_path, monkeypatch
):
    write_module(tmp_path, "NUMBER = 3\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        score_by_function(spec)
    assert str(caught.value).startswith(f"--reward_fn={spec}: ") and message in str(caught.value)


def test_interruption_of_a_function_is_not_taken_for_its_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "rlhf_test_error", KeyboardInterrupt, raising=False)
    path = write_module(tmp_path, "def f(prompts, responses):\n    raise rlhf_test_error\n")
    with pytest.raises(KeyboardInterrupt):
        call(f"{path}:f", ["p"], ["r"], [True])
