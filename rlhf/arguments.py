"""Argument types and checks that the scripts share."""

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.errors import exit_in_one_line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, whose errors take one line and exit with 2."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        """Exit with 2 after one line that names the argument and the value."""
        exit_in_one_line(self.prog, f"{message} (see {self.prog} --help)", 2)


def number(
    kind: type[int] | type[float],
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Callable[[str], int | float]:
    """An argparse type: a finite int or float within bounds (`least` ≤ x, `above` < x, …).

    >>> number(float, above=0, most=1)("0.5")
    0.5
    >>> number(int, least=1)("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: must be a whole number >= 1, not '0'
    """
    bounds = [
        f"{sign} {bound}"
        for sign, bound in ((">=", least), (">", above), ("<=", most), ("<", below))
        if bound is not None
    ]
    expected = ("a whole number " if kind is int else "a number ") + " and ".join(bounds)

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
            within = math.isfinite(value)  # OverflowError: an int beyond all floats
        except (ValueError, OverflowError):
            within = False
        inside = (
            within
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )
        if not inside:
            raise argparse.ArgumentTypeError(f"must be {expected.strip()}, not {text!r}")
        return value

    return parse


count = number(int, least=0)
positive_count = number(int, least=1)
seed = number(int, least=0, most=2**32 - 1)  # what numpy takes
ratio = number(float, least=0, most=1)
share = number(float, least=0, below=1)
inner_ratio = number(float, above=0, below=1)
positive = number(float, above=0)
non_negative = number(float, least=0)


def auto_or(kind: Callable[[str], int | float]) -> Callable[[str], int | float | str]:
    """An argparse type: `auto`, or what another type takes.

    >>> auto_or(positive)("auto"), auto_or(positive)("0.5")
    ('auto', 0.5)
    """

    def parse(text: str) -> int | float | str:
        try:
            return text if text == "auto" else kind(text)
        except argparse.ArgumentTypeError as error:
            told = str(error).replace("must be", "must be auto or", 1)
            raise argparse.ArgumentTypeError(told) from error

    return parse


def nonempty(text: str) -> str:
    """An argparse type: any text but the empty one, which an unset shell variable leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def named_path(text: str) -> tuple[str, str]:
    """An argparse type: NAME=PATH.

    >>> named_path("SFT=.model/sft/best")
    ('SFT', '.model/sft/best')
    """
    name, _, path = text.partition("=")
    if not name.strip() or not path.strip():
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, as SFT=folder, not {text!r}")
    return name, path


def boolean(text: str) -> bool:
    """An argparse type: true/false, yes/no, on/off, 1/0, in any case."""
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return words[text.lower()]


def add_boolean(parser: Parser, *names: str, default: bool, help: str) -> None:
    """Add a switch that takes `--x`, `--x=false`, `--x false`, `--no_x` and `--no-x`."""
    first = parser.add_argument(
        *names, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help
    )
    for name in names:
        bare = name.removeprefix("--")
        parser.add_argument(
            f"--no_{bare}",
            f"--no-{bare}",
            dest=first.dest,
            action="store_false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def command(script: str, **options: tuple[object, object]) -> str:
    """Write a command to copy; `options` gives value and default, and defaults are left out.

    >>> command("exec_run_rm.sh", sft_model_path=("my model", ".model/sft/best"), max_len=(64, 64))
    "sh exec_run_rm.sh '--sft_model_path=my model'"
    """
    words = [f"--{name}={value}" for name, (value, default) in options.items() if value != default]
    return shlex.join(["sh", script, *words])


COMPILING = "compiling: the first steps are slow"
TRACKERS = ("none", "tensorboard", "wandb", "trackio", "all")


def add_training_arguments(
    parser: Parser,
    *,
    log_step: int,
    log_step_names: Sequence[str] = ("--log_step",),
    unit: str = "steps",
) -> None:
    """Add the arguments that all four training scripts take in the same way."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the matrix products; weights stay float32 (auto: bfloat16 on CUDA)",
    )
    parser.add_argument(
        "--micro_batch_size",
        type=count,
        default=0,
        help="sequences in one forward: memory only, same gradient (0 = chosen from their lengths)",
    )
    add_boolean(
        parser,
        "--gradient_checkpointing",
        default=False,
        help="compute activations again in the backward pass: less memory, more time",
    )
    add_boolean(
        parser,
        "--compile",
        default=False,
        help="run the model through torch.compile: slow first steps, faster ones on a GPU",
    )
    parser.add_argument(
        "--max_gradient_norm",
        "--max_grad_norm",
        type=positive,
        default=1.0,
        help="gradients are scaled down to this norm",
    )
    parser.add_argument(
        *log_step_names, type=positive_count, default=log_step, help=f"{unit} between log lines"
    )
    parser.add_argument("--max_steps", type=count, default=0, help=f"a cap on {unit} (0 = none)")
    parser.add_argument(
        "--max_samples", type=count, default=0, help="training rows to use (0 = all)"
    )
    parser.add_argument(
        "--report_to",
        choices=TRACKERS,
        default="none",
        help="where else metrics and texts are sent",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on with a run that was stopped; never: start afresh; must: go on, or fail",
    )
    parser.add_argument(
        "--save_every",
        type=positive,
        default=10.0,
        help="minutes between states that a stopped run can go on from",
    )
    parser.add_argument(
        "--keep",
        type=count,
        default=0,
        help="checkpoints to keep: the newest so many, and the best (0 = all)",
    )


LORA = {  # an argument, and what `add_adapter` calls it
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
}


def add_lora_arguments(parser: Parser, *, dropout: float) -> None:
    """Add the arguments of LoRA; where dropout is 0 by default, `check_lora_arguments` keeps it."""
    add_boolean(
        parser,
        "--use_peft",
        default=False,
        help="train an adapter (LoRA) beside frozen weights: less memory",
    )
    parser.add_argument(
        "--lora_r", type=positive_count, default=16, help="rank of the adapter's matrices"
    )
    parser.add_argument(
        "--lora_alpha", type=positive_count, default=32, help="the adapter counts alpha / r times"
    )
    parser.add_argument(
        "--lora_dropout",
        type=share,
        default=dropout,
        help="dropout before the adapter" if dropout else "none here: only 0 is allowed",
    )
    parser.add_argument(
        "--lora_target_modules",
        type=nonempty,
        default="all-linear",
        help="layers with an adapter: their names, or the last parts of them (c_attn), with commas",
    )


def check_lora_arguments(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse arguments of LoRA without --use_peft, and dropout where there is none.

    Returns the arguments.
    """
    if args.lora_dropout > 0 and not parser.get_default("lora_dropout"):
        parser.error(
            f"--lora_dropout={args.lora_dropout:g}: must be 0 here: the policy is compared with the"
            " reference and with itself by forwards that must be the same function"
        )
    for name in LORA:
        value = getattr(args, name)
        if not args.use_peft and value != parser.get_default(name):
            parser.error(f"--{name}={value} needs --use_peft: add it, or leave --{name} out")
    return args


def lora_options(args: argparse.Namespace) -> dict[str, Any]:
    """Give the arguments of LoRA as `add_adapter` takes them."""
    options = {word: getattr(args, name) for name, word in LORA.items()}
    return {**options, "targets": [x.strip() for x in args.lora_target_modules.split(",")]}
