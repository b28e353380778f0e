"""What the command line takes, and the one line that it answers to what it doesn't take."""

import argparse

import pytest

from rlhf.arguments import (
    TRACKERS,
    Parser,
    add_boolean,
    add_training_arguments,
    boolean,
    count,
    inner_ratio,
    non_negative,
    number,
    positive,
    positive_count,
    ratio,
    seed,
)

TRAINING_DEFAULTS = {
    "dtype": "auto",
    "micro_batch_size": 0,
    "gradient_checkpointing": False,
    "compile": False,
    "max_gradient_norm": 1.0,
    "log_step": 10,
    "max_steps": 0,
    "max_samples": 0,
    "report_to": "none",
    "resume": "auto",
    "save_every": 10.0,
    "keep": 0,
}


def training_parser() -> Parser:
    parser = Parser("A stage.")
    add_training_arguments(parser, log_step=10, log_step_names=["--log_step", "--logging_steps"])
    return parser


def switch_parser(default: bool) -> Parser:
    parser = Parser("A switch.")
    add_boolean(parser, "--do_sampling", "--do_sample", default=default, help="sample")
    return parser


def complaint(parser: Parser, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a parser refuses a command line."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"{parser.prog}: error: ")
    assert captured.err.endswith(f"(see {parser.prog} --help)\n")
    return captured.err


@pytest.mark.parametrize(
    ("kind", "texts", "values"),
    [
        (count, ["0", "7"], [0, 7]),
        (positive_count, ["1", "1024"], [1, 1024]),
        (ratio, ["0", "0.5", "1"], [0, 0.5, 1]),
        (inner_ratio, ["0.001", "0.999"], [0.001, 0.999]),
        (positive, ["1e-5", "3"], [1e-5, 3]),
        (non_negative, ["0", "2.5"], [0, 2.5]),
        (number(int, least=2, most=4), ["2", "4"], [2, 4]),
        (number(float), ["-1e300"], [-1e300]),
    ],
)
def test_numbers_within_their_bounds_are_taken(kind, texts, values):
    assert [kind(text) for text in texts] == values


def test_whole_numbers_stay_whole():
    assert type(count("3")) is int and type(non_negative("3")) is float


@pytest.mark.parametrize(
    ("kind", "texts", "expected"),
    [
        (count, ["-1", "1.0", "1e3", "two", ""], "a whole number >= 0"),
        (positive_count, ["0", "-3"], "a whole number >= 1"),
        (ratio, ["-0.1", "1.1"], "a number >= 0 and <= 1"),
        (inner_ratio, ["0", "1"], "a number > 0 and < 1"),
        (seed, ["-1", "4294967296"], "a whole number >= 0 and <= 4294967295"),
        (positive, ["0", "-1e-9"], "a number > 0"),
        (non_negative, ["-1e-9"], "a number >= 0"),
        (number(int, least=2, most=4), ["1", "5"], "a whole number >= 2 and <= 4"),
        (number(float), ["five"], "a number"),
    ],
)
def test_numbers_beyond_their_bounds_are_refused_with_the_bound_and_the_value(
    kind, texts, expected
):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            kind(text)
        assert str(caught.value) == f"must be {expected}, not {text!r}"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "Infinity", "1e400", "9" * 400])
def test_numbers_must_be_finite(text):
    for kind in (count, non_negative, number(float)):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a"):
            kind(text)


def test_words_for_true_and_false_are_taken_in_any_case():
    assert all(boolean(text) for text in ("true", "True", "YES", "on", "1"))
    assert not any(boolean(text) for text in ("false", "False", "NO", "off", "0"))
    for text in ("", "2", "maybe", "truefalse"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be true or false, not"):
            boolean(text)


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("name", ["do_sampling", "do_sample"])
def test_a_switch_can_be_spelled_in_every_way(name, default):
    parser = switch_parser(default)
    on = [[f"--{name}"], [f"--{name}=true"], [f"--{name}", "true"], [f"--{name}=1"]]
    off = [[f"--{name}=false"], [f"--{name}", "false"], [f"--no_{name}"], [f"--no-{name}"]]
    for spellings, expected in ((on, True), (off, False), ([[]], default)):
        for argv in spellings:
            # vars: an alias adds no second name to what the script reads.
            assert vars(parser.parse_args(argv)) == {"do_sampling": expected}, argv


def test_the_last_word_about_a_switch_counts():
    parser = switch_parser(True)
    assert parser.parse_args(["--no_do_sampling", "--do_sample"]).do_sampling is True
    assert parser.parse_args(["--do_sample", "--no-do_sampling"]).do_sampling is False


def test_an_unclear_switch_is_refused_in_one_line(capsys):
    line = complaint(switch_parser(True), ["--do_sampling=maybe"], capsys)
    assert "--do_sampling" in line and "must be true or false, not 'maybe'" in line


def test_training_arguments_have_the_defaults_that_are_promised():
    assert vars(training_parser().parse_args([])) == TRAINING_DEFAULTS


def test_both_forms_of_a_flag_and_both_names_of_an_alias_mean_the_same():
    parser = training_parser()
    for argv in (["--log_step=3"], ["--log_step", "3"], ["--logging_steps=3"]):
        assert vars(parser.parse_args(argv)) == TRAINING_DEFAULTS | {"log_step": 3}
    for argv in (["--max_gradient_norm=2"], ["--max_grad_norm", "2"]):
        assert vars(parser.parse_args(argv)) == TRAINING_DEFAULTS | {"max_gradient_norm": 2.0}


@pytest.mark.parametrize(
    "argv",
    [
        ["--dtype=float16"],
        ["--micro_batch_size=-1"],
        ["--max_gradient_norm=0"],
        ["--max_gradient_norm=inf"],
        ["--log_step=0"],
        ["--max_steps=nan"],
        ["--max_samples=1.5"],
        ["--report_to=excel"],
        ["--resume=yes"],
        ["--save_every=0"],
        ["--keep=-1"],
        ["--log_step"],
    ],
)
def test_a_wrong_value_ends_in_one_line_that_names_flag_and_value(argv, capsys):
    flag, _, value = argv[0].partition("=")
    line = complaint(training_parser(), argv, capsys)
    assert flag in line and value in line


def test_flags_are_never_guessed_from_their_beginning(capsys):
    assert "--log_ste" in complaint(training_parser(), ["--log_ste=3"], capsys)
    assert "--max_gradient" in complaint(training_parser(), ["--max_gradient=3"], capsys)


def test_a_missing_required_flag_is_named(capsys):
    parser = Parser("A stage.")
    parser.add_argument("--sft_model_path", required=True)
    assert "--sft_model_path" in complaint(parser, [], capsys)


def test_a_complaint_over_several_lines_becomes_one(capsys):
    line = complaint(training_parser(), ["--report_to=a\nb"], capsys)
    assert "none" in line


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit) as caught:
        training_parser().parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: auto)" in text and "(default: 10)" in text
    assert "--no_" not in text


def test_trackers_are_those_that_are_promised():
    assert set(TRACKERS) == {"none", "tensorboard", "wandb", "trackio", "all"}
