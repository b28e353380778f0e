"""The report: its figures are the record's, and whatever a model wrote is shown as text."""

import json
import re
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rlhf import report
from rlhf.answers import Answers, about
from rlhf.cautions import cautions
from rlhf.checkpoints import content_of
from rlhf.disk import without_nan
from rlhf.evaluation import distinct
from rlhf.figures import draw_distributions, draw_reward_against_kl, draw_win_rates
from rlhf.judges import Judged
from rlhf.lineage import Run, lineage
from rlhf.markdown import fenced
from rlhf.report import html_report, judge_rows, markdown_report, response_rows, verdict_of
from rlhf.standings import by_scores, by_verdicts, standing
from rlhf.winrates import Interval

PROMPTS = ["Name a colour.", "Ignore <b>this</b>", "x"]
RESPONSES = {
    "SFT": ["Blue.", "<script>alert(1)</script>", "y"],
    "PPO": ["Blue!", '<img src=x onerror="alert(1)">\n```\n# heading', "y"],
}


def record(*judges: dict) -> dict:
    tokens, ended = torch.tensor([2, 3, 1]), torch.tensor([True, True, False])
    models = {
        name: about(Run(name, name, "--x"), Answers(texts, [], ended, tokens, None), seed=0)
        for name, texts in RESPONSES.items()
    }
    told = {
        "reference": "SFT",
        "how": "Three prompts.",
        "notes": ["<b>a note</b>"],
        "arguments": {"seed": 0},
    }
    return without_nan({**told, "models": models, "judges": list(judges)})


def scored() -> dict:
    scores = {"SFT": np.array([1.0, 2.0, 3.0]), "PPO": np.array([2.0, 1.5, 3.0 + 1e-7])}
    return by_scores("reward", "a reward model", scores, RESPONSES, seed=0)


def judged() -> dict:
    verdicts = Judged(
        wins=[0.5, None, 0.0],
        consistent=[False, None, True],
        first=[1.0, None, 0.0],
        num_asked=4,
        num_kept=2,
        failures={"HTTP 500": 2},
    )
    return by_verdicts("a judge", {"PPO": verdicts}, RESPONSES, seed=0)


def test_the_higher_score_wins_and_the_same_response_ties_whatever_its_score():
    says = scored()["models"]["PPO"]
    assert says["wins"] == [1.0, 0.0, 0.5]
    assert [says[name] for name in ("won", "tied", "lost", "skipped")] == [1, 1, 1, 0]
    assert says["win_rate"].mean == 0.5
    assert says["gain"].mean == pytest.approx((1 - 0.5) / 3)


def test_a_verdict_that_could_not_be_had_is_left_out_and_counted():
    says = judged()["models"]["PPO"]
    assert [says[name] for name in ("won", "tied", "lost", "skipped")] == [0, 1, 1, 1]
    assert says["win_rate"].mean == 0.25, "of the two prompts with a verdict"
    assert says["consistency"] == 0.5 and says["win_rate_shown_first"] == 0.5
    assert (judged()["num_asked"], judged()["num_kept"]) == (4, 2)


def test_equal_responses_alone_are_no_verdict():
    verdicts = Judged([0.5, None, 0.5], [None] * 3, [0.5, None, 0.5], 2, 0, {"time-out": 2})
    says = by_verdicts("a judge", {"PPO": verdicts}, RESPONSES, seed=0)["models"]["PPO"]
    assert says["win_rate"] is None and says["skipped"] == 3


def test_without_any_verdict_there_is_no_rate():
    says = standing(np.full(2, np.nan), ["a", "b"], ["c", "d"], seed=0)
    assert says["win_rate"] is says["win_rate_at_equal_length"] is None and says["skipped"] == 2


def test_lengths_are_those_of_the_texts():
    """Of a judge that likes nothing but long responses, little is left at equal length."""
    longer = np.arange(60) % 3 > 0
    texts = ["x" * (30 if is_longer else 10) for is_longer in longer]
    says = standing(longer.astype(float), texts, ["x" * 20] * 60, seed=0)
    assert says["win_rate"].mean == pytest.approx(2 / 3)
    assert 0.4 < says["win_rate_at_equal_length"].mean < 0.6


def test_tables_hold_the_figures_of_the_record():
    told = record(scored(), judged())
    header, sft, ppo = judge_rows(told, told["judges"][0])
    assert header[:4] == ["model", "mean score", "gain over SFT", "win rate over SFT"]
    assert sft[1].startswith("2.00 [") and sft[2:] == ["–"] * 6
    assert ppo[1].startswith("2.17 [") and ppo[3].startswith("50.0% [") and ppo[-3:] == list("111")
    header, ppo = judge_rows(told, told["judges"][1])
    assert dict(zip(header, ppo, strict=True))["skipped"] == "1"
    assert ppo[-2:] == ["50.0%", "50.0%"]
    assert [verdict_of(told, "PPO", row) for row in range(3)] == [
        "reward 2.00 · judge: ties",
        "reward 1.50 · judge: skipped",
        "reward 3.00 · judge: loses",
    ]
    assert verdict_of(told, "SFT", 0) == "reward 1.00"
    told["judges"][1]["models"]["PPO"]["wins"][0] = 1.0
    assert verdict_of(told, "PPO", 0) == "reward 2.00 · judge: wins"
    _, sft, _ = response_rows(told)
    assert sft[1] == "–" and sft[2].startswith("2.00 [") and sft[3] == "66.7%"
    assert sft[4:] == ["100.0%", "–"], "three words, no two in a row"


def test_a_rate_that_is_not_known_has_no_point():
    rate = Interval(0.6, 0.5, 0.7)
    figure = draw_win_rates({"A": {"all": rate, "even": rate}, "B": {"all": rate}}, "SFT")
    assert len(figure.axes[0].containers) == 3


def test_a_page_can_be_made_where_nothing_is_known_at_equal_length():
    says = judged()
    says["models"]["PPO"]["win_rate_at_equal_length"] = None
    told = record(says)
    assert 'alt="win rates"' in html_report(told, PROMPTS, RESPONSES, [])
    assert judge_rows(told, told["judges"][0])[1][2] == "–"


def test_the_page_shows_html_as_text():
    page = html_report(record(scored(), judged()), PROMPTS, RESPONSES, [])
    assert "<script" not in page and "<img src=x" not in page and "<b>this" not in page
    for text in ("<script>alert(1)</script>", '<img src=x onerror="', "<b>this", "<b>a note"):
        assert escape(text) in page
    assert not re.search(r"https?://", page)


def test_in_markdown_no_response_is_more_than_text():
    text = markdown_report(record(scored()), PROMPTS, RESPONSES)
    assert fenced(RESPONSES["PPO"][1]) in text and fenced(RESPONSES["PPO"][1]).startswith("````\n")
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "# heading" not in outside and "<img" not in outside and "Blue" not in outside


def told_of(*judges: dict, **changes: object) -> list[str]:
    facts = {"prompts_sha256": "", "num_prompts": 30, "rm_path": None, "reward_fn": None}
    return cautions([], judges, **{**facts, **changes})


def test_failures_of_a_judge_are_told():
    assert told_of(scored(), judged()) == ["No verdict from a judge: 2 HTTP 500."]


def test_a_judge_that_contradicts_itself_is_named():
    says = judged()
    says["failures"], says["models"]["PPO"]["consistency"] = {}, 0.25
    (told,) = told_of(scored(), says)
    assert told.startswith("a judge agrees with itself on 25% of the pairs of PPO")


def test_few_prompts_are_named():
    assert told_of(num_prompts=29)[0].startswith("With fewer than 30 prompts")


def test_who_was_trained_on_the_judging_function_is_named(tmp_path):
    arguments = {"reward_fn": "toyworld:gold_reward"}
    run = Run("P", checkpoint(tmp_path / "ppo/a", stage="ppo", arguments=arguments), "--x")
    facts = {"prompts_sha256": "", "num_prompts": 30, "rm_path": None}
    (told,) = cautions([run], [], **facts, reward_fn="toyworld:gold_reward")
    assert told.startswith("Trained to please toyworld:gold_reward: P.")
    assert cautions([run], [], **facts, reward_fn="other:reward") == []


def test_an_older_run_that_tells_only_a_path_followed_what_stands_there(tmp_path):
    rm = checkpoint(tmp_path / "rm/a", stage="rm")
    arguments = {"rm_model_path": rm}
    run = Run("P", checkpoint(tmp_path / "ppo/a", stage="ppo", arguments=arguments), "--x")
    facts = {"prompts_sha256": "", "num_prompts": 30, "reward_fn": None}
    assert len(cautions([run], [], rm_path=rm, **facts)) == 1
    other = checkpoint(tmp_path / "rm/b", stage="rm", epoch=2)
    assert cautions([run], [], rm_path=other, **facts) == []


def test_of_two_epochs_of_one_run_both_are_named(tmp_path):
    data = {"eval.jsonl": "digest"}
    paths = [checkpoint(tmp_path / f"ppo/{name}", stage="ppo", data=data) for name in "ab"]
    runs = [Run(f"P{i}", path, "--x") for i, path in enumerate(paths)]
    facts = {"num_prompts": 30, "rm_path": None, "reward_fn": None}
    (told,) = cautions(runs, [], prompts_sha256="digest", **facts)
    assert told.endswith("in the runs of: P0, P1.")


def test_two_runs_of_one_name_are_two(tmp_path):
    data = {"train.jsonl": "digest"}
    parent = checkpoint(tmp_path / "P/a", stage="sft")
    run = Run("P", checkpoint(tmp_path / "ppo/a", stage="ppo", parent=parent, data=data), "--x")
    facts = {"num_prompts": 30, "rm_path": None, "reward_fn": None}
    (told,) = cautions([run], [], prompts_sha256="digest", **facts)
    assert told == "Trained on these very prompts: P."


def test_a_parent_that_was_trained_anew_is_no_parent(tmp_path):
    sft = checkpoint(tmp_path / "sft/a", stage="sft")
    ppo = checkpoint(tmp_path / "ppo/a", stage="ppo", parent=sft, parent_content="of old")
    assert [run.name for run in lineage([Run("P", ppo, "--x")])] == ["P"]
    facts = {"parent": sft, "parent_content": content_of(sft)}
    ppo = checkpoint(tmp_path / "ppo/b", stage="ppo", **facts)
    assert [run.name for run in lineage([Run("P", ppo, "--x")])] == ["sft", "P"]


def test_pictures_show_what_the_tables_say(monkeypatch):
    seen = {}

    def keep(name):
        def draw(first, *others):
            seen[name] = first
            return Figure()

        return draw

    for name in ("draw_win_rates", "draw_reward_against_kl", "draw_distributions"):
        monkeypatch.setattr(report, name, keep(name))
    told = record(scored())
    for kl, model in zip(((0, 0, 0), (2, 1, 3)), told["models"].values(), strict=True):
        model["kl"] = kl
    says = told["judges"][0]["models"]["PPO"]
    says["win_rate_at_equal_length"] = [0.25, 0.2, 0.3]
    html_report(told, PROMPTS, RESPONSES, [])
    rates = {"all responses": Interval(*says["win_rate"]), "at equal length": (0.25, 0.2, 0.3)}
    assert seen["draw_win_rates"] == {"PPO": rates}
    assert seen["draw_reward_against_kl"]["PPO"] == ((2, 1, 3), Interval(*says["score"]))
    assert seen["draw_distributions"]["PPO"].tolist() == says["scores"]


def test_arms_and_means_are_drawn_where_they_are():
    rate = Interval(0.6, 0.5, 0.9)
    (bars,) = draw_win_rates({"A": {"all": rate}}, "SFT").axes[0].containers
    ((low, _), (high, _)) = bars.lines[2][0].get_segments()[0]
    assert (low, high) == pytest.approx((0.5, 0.9))
    points = {"SFT": (Interval(0, 0, 0), rate), "A": (Interval(2, 1, 4), rate)}
    axis = draw_reward_against_kl(points, "SFT", "reward").axes[0]
    x, y = axis.containers[1].lines[0].get_data()
    assert (x[0], y[0]) == (2, 0.6) and axis.get_xlabel().startswith("KL")
    axis = draw_distributions({"A": np.array([0.0, 0.0, 3.0])}, "reward").axes[0]
    assert axis.lines[0].get_xdata()[0] == 1.0, "the mean, not the median"


def checkpoint(path: Path, **facts: object) -> str:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(facts))
    return str(path)


def test_a_lineage_has_each_run_once_and_parents_first(tmp_path):
    sft = checkpoint(tmp_path / "sft/a", stage="sft", parent="gpt2")
    rm = checkpoint(tmp_path / "rm/a", stage="rm", parent=sft)
    arguments = {"rm_model_path": rm}
    ppo = checkpoint(tmp_path / "ppo/a", stage="ppo", parent=sft, arguments=arguments)
    dpo = checkpoint(tmp_path / "dpo/a", stage="dpo", parent=sft)
    gone = checkpoint(tmp_path / "late/a", stage="dpo", parent=str(tmp_path / "gone"))
    runs = [Run(name, path, "--x") for name, path in (("P", ppo), ("S", sft), ("D", dpo))]
    assert [run.name for run in lineage(runs)] == ["S", "rm", "P", "D"]
    assert [run.name for run in lineage([Run("late", gone, "--x")])] == ["late"]
    assert lineage([Run("hub", "openai-community/gpt2", "--x")]) == []


def test_distinct_counts_over_all_texts_together():
    texts = ["a b a", "A b", ""]  # words: a b a a b; pairs: ab ba | ab
    assert distinct(texts, 1) == pytest.approx(2 / 5)
    assert distinct(texts, 2) == pytest.approx(2 / 3)
    assert np.isnan(distinct(["", "one"], 2))
