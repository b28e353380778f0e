"""run_dpo.py's losses: what goes into each, what comes out, and what is refused."""

import json
import math

import pytest
import torch

import run_dpo
import run_sft
from rlhf.comparisons import Comparison, response_logprobs
from rlhf.disk import read_record, replace_record
from rlhf.errors import InputError, RunError
from rlhf.runtime import Runtime
from rlhf.tokens import Sample, decode_response
from tests.conftest import write_jsonl
from tests.faults.world import content
from tests.test_resume import send_signal_at

RUNTIME = Runtime(torch.device("cpu"), "float32", "")
LOSSES = ("dpo", "ipo", "hinge", "simpo", "rrhf")


def settings(loss, *options):
    return run_dpo.parse_args(["--sft_model_path=x", f"--loss={loss}", *options])


@pytest.fixture(scope="module")
def sft(tmp_path_factory, base_path, data_dir):
    root = tmp_path_factory.mktemp("model")
    options = [f"--model_id={base_path}", "--learning_rate=3e-3", "--num_epochs=2", "--max_len=64"]
    run_sft.main(run_sft.parse_args([*options, f"--data_dir={data_dir}/sft", f"--ckpt_dir={root}"]))
    return root / "best"


@pytest.fixture(scope="module")
def graded(tmp_path_factory, data_dir):
    """The rm split with three responses to every prompt, of which two are equally good."""
    root = tmp_path_factory.mktemp("graded")
    for side in ("train", "eval"):
        scored = [json.loads(line) for line in (data_dir / f"rm/{side}.jsonl").open()]
        more = [{**row, "response": "Not so, please.", "score": 2.0} for row in scored[::2]]
        write_jsonl(root / f"{side}.jsonl", scored + more)
    return root


def run(sft, data, folder, *options):
    common = [f"--sft_model_path={sft}", f"--data_dir={data}", f"--ckpt_dir={folder}"]
    options = ["--max_len=64", "--log_step=1", "--learning_rate=1e-3", *options]
    run_dpo.main(run_dpo.parse_args([*common, *options]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def data_for(loss, data_dir, graded):
    return graded if loss == "rrhf" else data_dir / "pref"


# What goes in


def test_beta_and_sft_coeff_are_the_losses_own_unless_told():
    assert [settings(loss).beta for loss in LOSSES] == [0.2, 0.5, 0.2, 2.0, None]
    assert [settings(loss).sft_coeff for loss in LOSSES] == [0, 0, 0, 0, 1]
    assert settings("ipo", "--beta=0.1", "--sft_coeff=0.3").beta == 0.1
    assert settings("rrhf", "--sft_coeff=0").sft_coeff == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--loss=rrhf", "--beta=0.1"], "--beta=0.1"),
        (["--loss=ipo", "--label_smoothing=0.1"], "--label_smoothing=0.1"),
        (["--label_smoothing=0.5"], "--label_smoothing"),
        (["--loss=hinge", "--simpo_gamma=0.5"], "--simpo_gamma=0.5"),
        (["--beta=often"], "must be auto or a number > 0"),
        (["--sft_coeff=-1"], "must be auto or a number >= 0"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused_in_one_line(options, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_dpo.parse_args(["--sft_model_path=x", *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("loss", "split", "told"),
    [
        ("rrhf", "pref", r"has no 'response'.*--data_dir=\.data/rm"),
        ("dpo", "rm", r"has no 'chosen'.*--data_dir=\.data/pref"),
        ("ipo", "rm", r"has no 'chosen'.*--data_dir=\.data/pref"),
    ],
)
def test_the_other_kind_of_data_is_named(loss, split, told, sft, data_dir, tmp_path):
    with pytest.raises(InputError, match=told) as caught:
        run(sft, data_dir / split, tmp_path, f"--loss={loss}")
    assert "\n" not in str(caught.value)


def test_rrhf_needs_scores(sft, data_dir, tmp_path):
    for side in ("train", "eval"):
        records = [json.loads(line) for line in (data_dir / f"rm/{side}.jsonl").open()]
        write_jsonl(tmp_path / f"{side}.jsonl", [{**row, "score": None} for row in records])
    with pytest.raises(InputError, match="score is None"):
        run(sft, tmp_path, tmp_path / "out", "--loss=rrhf")
    for side in ("train", "eval"):
        records = [json.loads(line) for line in (tmp_path / f"{side}.jsonl").open()]
        bare = [{"prompt": row["prompt"], "response": row["response"]} for row in records]
        write_jsonl(tmp_path / f"{side}.jsonl", bare)
    with pytest.raises(InputError, match=r"has no 'score'.*--data_dir=\.data/rm"):
        run(sft, tmp_path, tmp_path / "out", "--loss=rrhf")


def test_rrhf_needs_two_scores_for_a_prompt(sft, data_dir, tmp_path):
    for side in ("train", "eval"):
        lines = (data_dir / f"rm/{side}.jsonl").open()
        write_jsonl(tmp_path / f"{side}.jsonl", [{**json.loads(x), "score": 3.0} for x in lines])
    with pytest.raises(InputError, match=r"no prompt in train.*different scores.*=\.data/rm"):
        run(sft, tmp_path, tmp_path / "out", "--loss=rrhf")


def test_rrhf_compares_all_responses_to_a_prompt_the_best_one_first(tokenizer, graded):
    args = settings("rrhf", f"--data_dir={graded}", "--max_len=64")
    comparisons = run_dpo.load_comparisons(args, tokenizer, "train", 0)
    (first, *_), sizes = comparisons, {len(x.samples) for x in comparisons}
    assert sizes == {3}
    assert first.pairs == [(0, 1), (0, 2)]  # and not the two with equal scores
    assert "please" in tokenizer.decode(first.samples[0].response_ids)


@pytest.fixture
def answers(tokenizer, tmp_path):
    """What is read of three answers to one prompt, the middle one best; some have no room."""
    texts, scores = ("Two.", "It is one, I think.", "No idea."), (5, 9, 1)
    rows = [
        {"prompt": "Name it.", "response": text, "score": score}
        for text, score in zip(texts, scores, strict=True)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    encode = run_dpo.encode_samples

    def read(monkeypatch, *without_room):
        def some(*args, **kwargs):
            found = encode(*args, **kwargs)
            return [None if i in without_room else x for i, x in enumerate(found)]

        monkeypatch.setattr(run_dpo, "encode_samples", some)
        args = settings("rrhf", f"--data_dir={tmp_path}", "--max_len=64")
        found = run_dpo.load_comparisons(args, tokenizer, "train", 0)
        return [
            ([decode_response(tokenizer, x.response_ids) for x in some.samples], some.pairs)
            for some in found
        ]

    return read


def test_rrhf_takes_the_responses_of_a_prompt_from_best_to_worst(answers, monkeypatch):
    ranked = ["It is one, I think.", "Two.", "No idea."]
    assert answers(monkeypatch) == [(ranked, [(0, 1), (0, 2), (1, 2)])]


def test_a_response_without_room_leaves_its_prompt_to_the_others(answers, monkeypatch):
    assert answers(monkeypatch, 1) == [(["Two.", "No idea."], [(0, 1)])]
    with pytest.raises(InputError, match="different scores"):
        answers(monkeypatch, 1, 2)


# What comes out


def compared(*groups):
    """Comparisons of responses with so many tokens; all pairs, the best first."""
    return [
        Comparison(
            [Sample([1], [2] * n) for n in lengths],
            [(i, j) for i in range(len(lengths)) for j in range(i + 1, len(lengths))],
        )
        for lengths in groups
    ]


@pytest.mark.parametrize(
    ("loss", "expected", "chosen", "rejected"),
    [
        # sums: margin (-4 + 6) - (-6 + 5) = 3
        ("dpo", math.log(1 + math.exp(-0.6)), 0.4, -0.2),
        ("hinge", 0.4, 0.4, -0.2),
        # means over 4 and 2 tokens: (-1 + 1.5) - (-3 + 2.5) = 1, which is what 0.5 asks for
        ("ipo", 0.0, 0.25, -0.25),
        # 2 * (-1 + 3) - 1 = 3
        ("simpo", math.log(1 + math.exp(-3)), -2.0, -6.0),
    ],
)
def test_terms_of_every_loss_worked_by_hand(loss, expected, chosen, rejected):
    logprobs, ref = torch.tensor([[-4.0, -6.0]]), torch.tensor([[-6.0, -5.0]])
    if loss in run_dpo.REFERENCE_FREE:
        ref = torch.zeros(1, 2)
    terms = run_dpo.preference_terms(settings(loss), compared([4, 2]), logprobs, ref)
    assert terms["loss"].item() == pytest.approx(expected, abs=1e-6)
    assert terms["rewards/chosen"].item() == pytest.approx(chosen)
    assert terms["rewards/rejected"].item() == pytest.approx(rejected)
    assert terms["rewards/margins"].item() == pytest.approx(chosen - rejected)
    assert terms["rewards/accuracies"].item() == 1.0
    assert (terms["logps/chosen"].item(), terms["logps/rejected"].item()) == (-4.0, -6.0)


def test_equal_rewards_are_no_hit():
    same = torch.tensor([[-4.0, -6.0]])
    terms = run_dpo.preference_terms(settings("dpo"), compared([4, 2]), same, same)
    assert terms["rewards/accuracies"].item() == 0.0


def test_the_held_out_loss_is_the_one_that_is_trained(gpt2):
    args = settings("dpo", "--label_smoothing=0.2", "--sft_coeff=0.5")
    pairs, ref = compared([3, 5], [2, 4]), torch.tensor([[-9.0, -21.0], [-7.0, -15.0]])
    trained = run_dpo.add_gradient(args, gpt2, 0, RUNTIME, pairs, ref, run_dpo.Room(0))
    judged = run_dpo.evaluate(args, gpt2, 0, RUNTIME, pairs, ref, run_dpo.Room(0))
    for name, value in trained.items():
        assert judged[f"eval_{name}"] == pytest.approx(value.item(), abs=1e-5)


def test_rrhf_sums_over_the_pairs_of_a_prompt_and_imitates_the_best():
    # Means: -2, -1, -1.5 | -1, -3. Pairs in the wrong order: 1 + 0.5 | none; right: 1 of 3 | 1.
    logprobs = torch.tensor([[-4.0, -1.0, -3.0], [-2.0, -6.0, 0.0]])
    comparisons, ref = compared([2, 1, 2], [2, 2]), torch.zeros(2, 3)
    terms = run_dpo.preference_terms(settings("rrhf"), comparisons, logprobs, ref)
    assert terms["loss"].tolist() == pytest.approx([1.5 + 2.0, 0.0 + 1.0])
    assert terms["nll_loss"].tolist() == pytest.approx([2.0, 1.0])
    assert terms["rewards/accuracies"].tolist() == pytest.approx([1 / 3, 1.0])
    # better of the pairs: first, first, second; worse: second, third, third
    assert terms["rewards/chosen"].tolist() == pytest.approx([-5 / 3, -1.0])
    assert terms["rewards/rejected"].tolist() == pytest.approx([-4 / 3, -3.0])
    bare = run_dpo.preference_terms(settings("rrhf", "--sft_coeff=0"), comparisons, logprobs, ref)
    assert bare["loss"].tolist() == pytest.approx([1.5, 0.0]) and "nll_loss" not in bare


def test_label_smoothing_counts_a_share_of_the_pairs_the_other_way():
    logprobs, ref = torch.tensor([[-4.0, -6.0]]), torch.tensor([[-6.0, -5.0]])
    args = settings("dpo", "--label_smoothing=0.25")
    terms = run_dpo.preference_terms(args, compared([4, 2]), logprobs, ref)
    # 0.2 * 3 = 0.6: 0.75 * ln(1 + e^-0.6) + 0.25 * ln(1 + e^0.6) = 0.437488 + 0.25 * 0.6
    assert terms["loss"].item() == pytest.approx(0.587488, abs=1e-5)
    assert terms["rewards/margins"].item() == pytest.approx(0.6)


def test_sft_term_is_the_mean_cross_entropy_of_the_chosen_response():
    logprobs, zero = torch.tensor([[-4.0, -6.0]]), torch.zeros(1, 2)
    terms = run_dpo.preference_terms(
        settings("hinge", "--sft_coeff=0.5"), compared([4, 2]), logprobs, zero
    )
    # 1 - 0.2 * 2 + 0.5 * 4 / 4
    assert terms["loss"].item() == pytest.approx(0.6 + 0.5)
    assert terms["nll_loss"].item() == pytest.approx(1.0)


def test_logprobs_of_a_group_stand_in_its_row(gpt2):
    groups = [[Sample([5, 6], [7, 8]), Sample([5, 6], [9])], [Sample([4], [3, 2, 1])]]
    found = response_logprobs(gpt2, [Comparison(x, []) for x in groups], 0, RUNTIME)
    assert found.shape == (2, 2) and found[1, 1] == 0
    for row, group in enumerate(groups):
        for column, sample in enumerate(group):
            ids = torch.tensor([sample.prompt_ids + sample.response_ids])
            own = gpt2(ids).logits.log_softmax(dim=-1)[0]
            first = len(sample.prompt_ids)
            told = sum(own[first + i - 1, x] for i, x in enumerate(sample.response_ids))
            assert found[row, column].item() == pytest.approx(told.item(), abs=1e-4)


def test_micro_batches_of_smaller_groups_change_no_logprob(gpt2):
    groups = compared([3, 5, 2], [2, 4], [6])
    whole = response_logprobs(gpt2, groups, 0, RUNTIME)
    for size in (1, 6):
        parts = run_dpo.all_logprobs(gpt2, 0, RUNTIME, groups, run_dpo.Room(size))
        assert torch.allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_change_no_gradient(loss, gpt2):
    args = settings(loss, "--sft_coeff=0.1")
    comparisons = compared([3, 5], [2, 4], [6, 1])
    if loss == "rrhf":
        comparisons = compared([3, 5, 2], [2, 4], [6, 1, 4])
    ref = torch.zeros(3, 3) if loss in run_dpo.REFERENCE_FREE else torch.full((3, 2), -9.0)
    found = []
    for size in (1, 6, 9):
        gpt2.zero_grad()
        room = run_dpo.Room(size)
        means = run_dpo.add_gradient(args, gpt2, 0, RUNTIME, comparisons, ref, room)
        found.append((means["loss"].item(), gpt2.transformer.wte.weight.grad.clone()))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=1e-5)


# The script


@pytest.mark.parametrize(("loss", "start"), [("ipo", 1.0), ("hinge", 1.0), ("dpo", math.log(2))])
def test_a_reference_that_is_not_the_policy_stops_the_run(loss, start):
    args = settings(loss, "--sft_coeff=0.5")
    means = {"loss": torch.tensor(start + 0.5), "nll_loss": torch.tensor(1.0)}
    run_dpo.check_first_loss(args, means, RUNTIME)
    with pytest.raises(RunError, match=f"not .* = {start:.5f}"):
        run_dpo.check_first_loss(args, {**means, "loss": torch.tensor(start + 0.501)}, RUNTIME)


@pytest.mark.parametrize(
    ("loss", "beta", "precision", "allowed"),
    [
        # At least 0.01; 0.2 of a margin of sums, whose slope is beta / 2 (hinge: beta); 0.02 of
        # one of means, whose slope is 1 / beta.
        ("dpo", 0.2, "bfloat16", 0.02),
        ("dpo", 0.05, "bfloat16", 0.01),
        ("ipo", 0.5, "bfloat16", 0.04),
        ("ipo", 5.0, "bfloat16", 0.01),
        ("hinge", 0.2, "bfloat16", 0.04),
        # At least 1e-4 (of 25: 25e-4); 1e-3 and 1e-5 of the margins.
        ("dpo", 0.2, "float32", 1e-4),
        ("dpo", 5.0, "float32", 2.5e-3),
        ("ipo", 0.1, "float32", 2.5e-3),
        ("hinge", 1.0, "float32", 1e-3),
    ],
)
def test_rounding_may_move_the_first_loss_so_far(loss, beta, precision, allowed):
    args, runtime = settings(loss, f"--beta={beta}"), RUNTIME._replace(precision=precision)
    start = {"dpo": math.log(2), "ipo": 1 / (4 * beta**2), "hinge": 1.0}[loss]
    for sign in (1, -1):
        near, far = (torch.tensor(start + sign * allowed * x) for x in (0.95, 1.05))
        run_dpo.check_first_loss(args, {"loss": near}, runtime)
        with pytest.raises(RunError, match=f"--loss={loss}"):
            run_dpo.check_first_loss(args, {"loss": far}, runtime)


PAIR_LOSSES = [["dpo"], ["dpo", "--label_smoothing=0.1"], ["ipo"], ["hinge"]]


@pytest.mark.parametrize("options", PAIR_LOSSES, ids=" ".join)
@pytest.mark.parametrize("planted", ["dropout", "another reference"])
def test_dropout_or_another_reference_stops_a_run(
    options, planted, sft, data_dir, tmp_path, monkeypatch
):
    loss, *options = options
    load, compute = run_dpo.load_policy, run_dpo.all_logprobs
    if planted == "dropout":
        left_on = {"dropout": 0.1}
        monkeypatch.setattr(run_dpo, "load_policy", lambda *a, **k: load(*a, **k, **left_on))
    else:
        monkeypatch.setattr(run_dpo, "all_logprobs", lambda *a: 1.1 * compute(*a))
    with pytest.raises(RunError, match=f"first loss of --loss={loss} is .*differ"):
        run(sft, data_dir / "pref", tmp_path, f"--loss={loss}", "--sft_coeff=0.5", *options)


COMBINATIONS = [
    *((loss, options) for loss in LOSSES for options in ([], ["--use_peft", "--sft_coeff=0.5"])),
    *(
        pytest.param(loss, [option], marks=pytest.mark.slow)  # the quick ones have both at once
        for loss in LOSSES
        for option in ("--use_peft", "--sft_coeff=0.5")
    ),
    pytest.param("dpo", ["--label_smoothing=0.1", "--use_peft"], marks=pytest.mark.slow),
    ("dpo", ["--label_smoothing=0.1"]),
    ("dpo", ["--label_smoothing=0.1", "--sft_coeff=1", "--beta=1"]),
    ("rrhf", ["--sft_coeff=0", "--micro_batch_size=2"]),
    ("simpo", ["--simpo_gamma=0", "--beta=1"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "options"), COMBINATIONS)
def test_every_loss_learns_to_tell_better_from_worse(
    loss, options, sft, data_dir, graded, tmp_path
):
    data = data_for(loss, data_dir, graded)
    found = run(sft, data, tmp_path, f"--loss={loss}", "--batch_size=8", *options)
    first, last = (
        [row[x] for x in ("eval_loss", "eval_rewards/margins")] for row in (found[0], found[-1])
    )
    assert last[0] < first[0] and last[1] > first[1]
    starts = {"dpo": math.log(2), "ipo": 1.0, "hinge": 1.0}
    if loss in starts and not options:
        assert found[1]["loss"] == pytest.approx(starts[loss], abs=1e-4)
    kept = tmp_path / ".resume/ref_logprobs"
    assert kept.exists() == (loss not in run_dpo.REFERENCE_FREE)
    run_json = json.loads((tmp_path / "best/run.json").read_text())
    assert run_json["arguments"]["beta"] == settings(loss, *options).beta


@pytest.mark.slow
@pytest.mark.parametrize("loss", run_dpo.REFERENCE_FREE)
def test_reference_free_losses_never_ask_for_the_reference(
    loss, sft, data_dir, graded, tmp_path, monkeypatch
):
    run(sft, data_dir / "pref", tmp_path, "--max_steps=1")  # leaves logprobs that could be read
    for name in ("active", "reference_fingerprint", "kept_logprobs", "save_tensors"):
        monkeypatch.setattr(run_dpo, name, None)
    run(sft, data_for(loss, data_dir, graded), tmp_path, f"--loss={loss}", "--max_steps=1")
    assert not (tmp_path / ".resume/ref_logprobs").exists()


def test_a_run_from_before_these_losses_is_this_very_run(sft, data_dir, tmp_path, capsys):
    run(sft, data_dir / "pref", tmp_path, "--beta=0.2", "--max_steps=1")
    file = tmp_path / ".resume/run.json"
    record = read_record(file)
    for name in ("label_smoothing", "sft_coeff", "simpo_gamma"):
        record["made_from"]["arguments"].pop(name, None)
    replace_record(file, record)
    run(sft, data_dir / "pref", tmp_path, "--max_steps=1")
    assert "this very run is finished" in capsys.readouterr().out
    run(sft, data_dir / "pref", tmp_path, "--max_steps=1", "--label_smoothing=0.1")
    assert (tmp_path / "earlier/1").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simpo", "rrhf"])
def test_a_stopped_run_ends_in_the_bytes_of_one_that_was_not(
    loss, sft, data_dir, graded, tmp_path, monkeypatch
):
    data, options = data_for(loss, data_dir, graded), [f"--loss={loss}", "--batch_size=8"]
    run(sft, data, tmp_path / "whole", *options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        send_signal_at(patch, run_dpo, "optimizer_step", 3)
        run(sft, data, tmp_path / "stopped", *options)
    run(sft, data, tmp_path / "stopped", *options)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
