"""The command line shared by both programs: flags, defaults and validation."""

import argparse
import contextlib
import difflib
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from parle import checkpoint, launcher, rank_exit
from parle.algorithm import PRESETS
from parle.streams import ignore_write_errors, prepare_streams

try:
    import loader
    import models
except ImportError as error:  # `pip install .` installs neither, since other projects have modules of these names
    prepare_streams()
    sys.stderr.write(f"error: run this program in a checkout of Parle, which has models.py and loader.py ({error})\n")
    raise SystemExit(2) from error

MAX_STEPS_PER_ROUND = 10**9
MAX_THREADS = 1024  # far above the cores of any node; if OpenMP cannot start its threads the program crashes


class UsageError(Exception):
    """An error of the user. The message says what to type instead."""


@contextlib.contextmanager
def launcher_errors() -> Iterator[None]:
    """Turn the launcher's OSError into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(str(error)) from error


def print_error(prog: str, error: Exception) -> None:
    """Print an error as one line on stderr, on the first rank only."""
    if launcher.is_first_rank():
        with ignore_write_errors(sys.stderr):
            sys.stderr.write(f"{prog}: error: {rank_exit.describe_error(error)}\n")
            sys.stderr.flush()


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError, prints help on the first rank only and suggests similar flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, *arguments: Any) -> None:
        if launcher.is_first_rank():
            super().print_help(*arguments)

    def parse_args(self, *arguments: Any) -> argparse.Namespace:
        args, unknown = self.parse_known_args(*arguments)
        if unknown:
            similar = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            hint = f"did you mean {similar[0]}?" if similar else "-h lists all arguments"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return args


def _number(kind: Callable[[str], Any], is_valid: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return value

    return convert


def _choice(names: Collection[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            similar = difflib.get_close_matches(text, names, 1, cutoff=0.4)
            hint = f", did you mean {similar[0]}?" if similar else ""
            raise argparse.ArgumentTypeError(f"{text} is not available{hint} (choose from {', '.join(names)})")
        return text

    return convert


seed = _number(int, lambda value: 0 <= value < 2**63, "an integer of at least 0, such as 42")
num_replicas = _number(int, lambda value: 1 <= value <= 10_000, "an integer from 1 to 10000, such as 3")
positive_int = _number(int, lambda value: value >= 1, "an integer of at least 1, such as 3")
nonnegative_int = _number(int, lambda value: value >= 0, "an integer of at least 0, such as 2")
batch_size = _number(int, lambda value: value >= 2, "an integer of at least 2 (batch norm needs two), such as 128")
nonnegative_float = _number(float, lambda value: 0 <= value <= 1e6, "a number from 0 to 1e6, such as 0.01")
positive_float = _number(float, lambda value: 0 < value < math.inf, "a number above 0, such as 0.25")
epochs = _number(float, lambda value: 0 < value <= 1e9, "a number above 0 and up to 1e9, such as 0.25")
decay = _number(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1, such as 0.75")
fraction = _number(float, lambda value: 0 < value <= 1, "a number above 0 and up to 1, such as 0.5")
sync_every = _number(
    lambda text: text if text == "auto" else int(text),
    lambda value: value == "auto" or 1 <= value <= MAX_STEPS_PER_ROUND,
    "an integer from 1 to 1e9, such as 25, or auto",
)


def directory(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("a directory needs a name, such as . for the current one")
    return Path(text)


def build_parser(prog: str, description: str) -> Parser:
    """Return the parser of all common flags. A flag whose default depends on other flags is None unless given."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parle, networks, datasets, methods = (
        PRESETS["parle"],
        ", ".join(models.RECIPES),
        ", ".join(loader.DATASETS),
        ", ".join(PRESETS),
    )

    add = parser.add_argument_group("what to train").add_argument
    add(
        *("-m", "--model"),
        type=_choice(models.RECIPES),
        default="lenet",
        metavar="NAME",
        help=f"network: {networks} (default: %(default)s)",
    )
    add(
        "-d",
        "--dataset",
        type=_choice(loader.DATASETS),
        metavar="NAME",
        help=f"data set: {datasets} (default: the model's)",
    )
    add(
        *("-s", "--seed"),
        type=seed,
        default=42,
        metavar="N",
        help="random seed of initial weights, data order, augmentation and dropout (default: %(default)s)",
    )

    add = parser.add_argument_group("algorithm").add_argument
    add(
        *("-n", "--replicas"),
        type=num_replicas,
        metavar="N",
        help="number of replicas (default: the number of ranks under a launcher, else 3; 1 for sgd, entropy-sgd)",
    )
    add(
        "--method",
        type=_choice(PRESETS),
        default="parle",
        metavar="NAME",
        help=f"preset of n, L, gamma and rho: {methods} (default: %(default)s)",
    )
    add(
        *("-L", "--sync-every"),
        type=sync_every,
        metavar="L",
        help=f"steps per round, or auto for lr / gamma_k (default: {parle['sync_every']})",
    )
    add(
        "--gamma",
        type=nonnegative_float,
        metavar="X",
        help=f"coefficient of the coupling to the anchor; 0 switches it off (default: {parle['gamma']})",
    )
    add(
        "--rho",
        type=nonnegative_float,
        metavar="X",
        help=f"coefficient of the coupling between replicas; 0 switches it off (default: {parle['rho']})",
    )
    add(
        "--alpha",
        type=decay,
        default=0.75,
        metavar="X",
        help="decay of the inner average per step (default: %(default)s)",
    )
    add(
        "--outer-lr-scale",
        type=nonnegative_float,
        default=1.0,
        metavar="X",
        help="outer lr in units of lr (default: %(default)s)",
    )
    add("--outer-momentum", type=decay, metavar="X", help="Nesterov momentum of the outer update (default: --momentum)")
    add(
        "--master-average",
        type=decay,
        default=0.0,
        metavar="X",
        help="decay per round of an average of the master, which is then tested and saved; 0 is off (default: 0)",
    )

    add = parser.add_argument_group("recipe").add_argument
    add(
        *("-b", "--batch-size"),
        type=batch_size,
        metavar="N",
        help=f"mini-batch size per replica (default: {models.COMMON['batch_size']})",
    )
    add(
        *("-B", "--epochs"),
        type=epochs,
        metavar="X",
        help="length of the run in epochs, each L passes over the data; fractions allowed (default: the model's)",
    )
    add(
        "--lr",
        type=nonnegative_float,
        metavar="X",
        help=f"learning rate of the inner and the outer update (default: {models.COMMON['lr']})",
    )
    add("--lr-drops", type=epochs, nargs="*", metavar="X", help="epochs at which lr drops (default: the model's)")
    add(
        "--lr-decay",
        type=positive_float,
        metavar="X",
        help=f"factor of lr at each drop (default: {models.COMMON['lr_decay']})",
    )
    add(
        "--momentum",
        type=decay,
        metavar="X",
        help=f"Nesterov momentum of the inner update (default: {models.COMMON['momentum']})",
    )
    add(
        "--weight-decay",
        type=nonnegative_float,
        metavar="X",
        help="L2 penalty, in the inner update only (default: the model's)",
    )
    add("--dropout", type=decay, metavar="X", help="dropout probability of the network (default: the model's)")

    add = parser.add_argument_group("data").add_argument
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="flip and crop training images at random (default: on for CIFAR)",
    )
    add(
        "--zca",
        action="store_true",
        help="normalize images by global contrast and ZCA whitening (default: by mean and standard deviation)",
    )
    add(
        "--frac",
        type=fraction,
        default=1.0,
        metavar="X",
        help="fraction of the training set that each replica uses (default: %(default)s)",
    )
    add(
        "--data",
        type=directory,
        metavar="DIR",
        help="directory of raw data in torchvision's layout (default: download to PROC/raw)",
    )
    add(
        "--proc",
        type=directory,
        default=Path("proc"),
        metavar="DIR",
        help="directory of pre-processed data (default: %(default)s)",
    )

    add = parser.add_argument_group("run").add_argument
    add("--out", type=directory, metavar="DIR", help="output directory (default: runs/TIME-MODEL-DATASET)")
    add(
        "--eval-every",
        type=positive_int,
        metavar="N",
        help="rounds between evaluations, in addition to the end of every epoch and of the run (default: none)",
    )
    add(
        "--checkpoint-every",
        type=positive_int,
        metavar="N",
        help="rounds between checkpoints, in addition to the end of every epoch and of the run (default: none)",
    )
    add(
        "--resume",
        type=directory,
        nargs="?",
        const=True,
        metavar="DIR",
        help="output directory of the run to resume, or a checkpoint (default: --out)",
    )
    add(
        "--on-nan",
        type=_choice(("restart", "stop")),
        default="restart",
        metavar="NAME",
        help="if a replica is NaN or infinite: restart it from the master, or stop (default: %(default)s)",
    )
    add(
        "--doctor",
        action="store_true",
        help="print versions, devices, data and the cost of a synchronization, then exit without training",
    )
    add(
        "--timeout",
        type=positive_float,
        default=1800.0,
        metavar="S",
        help="seconds that a rank waits for the others (default: %(default)g)",
    )
    add("--device", default="auto", metavar="NAME", help="device: auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add(
        "--amp",
        type=_choice(("off", "bf16")),
        default="off",
        metavar="NAME",
        help="precision of forward and backward passes: off (float32) or bf16 (default: %(default)s)",
    )
    return parser


def parse(parser: Parser, restarted: bool = False) -> argparse.Namespace:
    """Parse the command line. A resumed run keeps its arguments, except for those given again.

    `resume` becomes the checkpoint that was named, or the directory of the run's checkpoints.

    Args:
        restarted: torchrun has restarted the ranks, which resume from the newest checkpoint of their own run.

    Raises:
        UsageError: an invalid argument.
    """
    args = parser.parse_args()
    args.program = parser.prog
    was_new = args.resume is None
    if restarted:
        args.resume = _resume_after_restart(args)
    if args.resume is None:
        return args
    folder = args.out if args.resume is True else args.resume
    if folder is None:
        raise UsageError("--resume needs the output directory of the run: --resume DIR")
    is_checkpoint = os.path.exists(folder / checkpoint.MANIFEST)
    if is_checkpoint:
        folder = folder.resolve()
    try:
        paths = [folder] if is_checkpoint else checkpoint.list_checkpoints(folder / checkpoint.FOLDER)
        _, manifest, _ = checkpoint.latest_valid(paths, verify_files=False)
    except (checkpoint.CheckpointError, OSError) as error:
        missing = not os.path.isdir(folder)
        raise UsageError(f"--resume {folder}: {'this directory does not exist' if missing else error}") from error
    run = folder if not is_checkpoint else folder.parent.parent if folder.parent.name == checkpoint.FOLDER else None
    try:
        arguments = saved_arguments(parser, manifest["arguments"]) | dict(out=run)
    except argparse.ArgumentError as error:
        raise UsageError(f"--resume {folder}: {checkpoint.MANIFEST}: {error}") from error
    if not launcher.is_started_by_parle() and launcher.has_several_ranks():
        del arguments["replicas"]  # by default the number of ranks, which may differ now
        arguments.pop("max_restarts", None)  # of ranks that this program starts
    if PRESETS[arguments["method"]]["rho"] == "1/n" and arguments["rho"] == 1 / manifest["num_replicas"]:
        del arguments["rho"]  # it depends on n
    parser.set_defaults(**arguments)
    args = parser.parse_args()
    args.program = parser.prog
    for name in ("model", "dataset", "zca", "method"):
        if getattr(args, name) != arguments[name]:
            raise UsageError(f"--resume: {folder} has {name} {arguments[name]}, not {getattr(args, name)}")
    if restarted and was_new:
        for name in arguments.keys() - {"data", "proc", "out", "device"}:
            if getattr(args, name) != arguments[name]:
                raise UsageError(f"--out {run} already contains another run, whose {name} is {arguments[name]}")
    args.resume = folder if is_checkpoint else run / checkpoint.FOLDER
    return args


def _resume_after_restart(args: argparse.Namespace) -> Path | bool | None:
    """Return the value of --resume for ranks that torchrun has restarted: their own run, if it has a checkpoint."""
    run, given = args.out, args.resume
    if run is None and given is None:
        raise UsageError("torchrun has restarted the ranks, which cannot find their run: use --out DIR")
    if run is None and given is not True:
        run = given.parent.parent if given.parent.name == checkpoint.FOLDER else given
    if run is None or checkpoint.list_checkpoints(run / checkpoint.FOLDER):
        return run or given
    if args.out is not None and (run / "log.jsonl").exists():
        raise UsageError(f"torchrun has restarted the ranks, but --out {run} contains no checkpoint yet: delete it")
    return given


def saved_arguments(parser: Parser, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a checkpoint, validated and converted like those of the command line.

    Arguments that `parser` does not have, such as the other program's, are left out.

    Raises:
        ArgumentError: an invalid argument, or one that every checkpoint has is missing.
    """
    arguments = {}
    for action in parser._actions:
        value = saved.get(action.dest) if action.dest != "doctor" else None
        try:
            if value is not None:
                arguments[action.dest] = _convert_saved(action, value)
            elif action.dest in ("model", "dataset", "method", "zca", "replicas", "rho"):
                raise argparse.ArgumentTypeError("missing")
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(action, str(error)) from error
    return arguments


def _convert_saved(action: argparse.Action, value: Any) -> Any:
    """Return the value of an argument from JSON. Raises: ArgumentTypeError."""
    convert = action.type or str
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value} is not true or false")
        return value
    if action.nargs == "*":
        if not isinstance(value, list):
            raise argparse.ArgumentTypeError(f"{value} is not a list")
        return [convert(str(item)) for item in value]
    return convert(str(value))


def complete(given: argparse.Namespace, num_ranks: int | None) -> argparse.Namespace:
    """Return the arguments with all defaults filled in, after validating them together.

    Args:
        given: what `parse` returned.
        num_ranks: the launcher's number of ranks; None without a launcher.

    Raises:
        UsageError: arguments that do not fit together, this machine or the number of ranks.
    """
    args = apply_defaults(given, num_ranks)
    validate(args, num_ranks)
    return args


def apply_defaults(given: argparse.Namespace, num_ranks: int | None) -> argparse.Namespace:
    """Fill in the defaults that depend on the method, the model and the data set.

    A recipe's epochs are for the default L. With another L they are scaled to the same number of steps, so with L = 1
    the number of epochs is 25 times larger.
    """
    defaults: dict[str, Any] = {"replicas": num_ranks or 3, **models.COMMON, **models.RECIPES[given.model]}
    defaults |= {name: value for name, value in PRESETS[given.method].items() if value is not None}
    length = given.sync_every or defaults["sync_every"]
    if length != "auto":
        scale = PRESETS["parle"]["sync_every"] / length
        defaults["epochs"] *= scale
        defaults["lr_drops"] = [drop * scale for drop in defaults["lr_drops"]]
    args = argparse.Namespace(**vars(given))
    for name, default in defaults.items():
        if getattr(given, name) is None:
            setattr(args, name, default)
    if args.rho == "1/n":
        args.rho = 1 / args.replicas
    if args.outer_momentum is None:
        args.outer_momentum = args.momentum
    if args.augment is None:
        args.augment = loader.DATASETS[args.dataset].augment
    return args


def validate(args: argparse.Namespace, num_ranks: int | None) -> None:
    """Check that arguments fit together, this machine and the number of ranks. Raises: UsageError."""
    if args.sync_every == "auto" and not args.gamma:
        raise UsageError("-L auto needs a coupling to the anchor: use --gamma 0.01")
    if args.sync_every == "auto" and args.lr > MAX_STEPS_PER_ROUND * args.gamma:
        raise UsageError(f"-L auto is lr / gamma, and {args.lr:g} / {args.gamma:g} is too large: use --gamma 0.01")
    threads = (os.environ.get("OMP_NUM_THREADS") or "1").split(",")[0]
    if not (threads.strip().isdecimal() and len(threads) < 9 and 1 <= int(threads) <= MAX_THREADS):
        raise UsageError(f"OMP_NUM_THREADS is {threads!r}, not a number of threads from 1 to {MAX_THREADS}")
    if args.data is not None and not os.path.isdir(args.data):
        raise UsageError(f"--data {args.data}: no such directory, or no permission to read it")
    if num_ranks is None:
        return
    if num_ranks % args.replicas:
        divisors = ", ".join(str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)
        raise UsageError(
            f"-n {args.replicas} does not divide the number of ranks, {num_ranks}: use -n with one of {divisors}"
        )
    ranks_per_replica = num_ranks // args.replicas
    if args.batch_size < 2 * ranks_per_replica:
        raise UsageError(
            f"-b {args.batch_size} leaves fewer than 2 images for each of {ranks_per_replica} ranks of a replica: "
            f"use -b {2 * ranks_per_replica} or more"
        )


def find_devices(name: str) -> list[torch.device]:
    """Return the devices of this machine that `name` selects: one if it has an index, all of its kind otherwise.

    Raises:
        UsageError: there is none.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = {"cpu": 1} if accelerator is None else {accelerator.type: torch.accelerator.device_count(), "cpu": 1}
    if name == "auto":
        name = next(iter(kinds))
    kind, _, number = name.partition(":")
    indices = range(kinds.get(kind, 0))
    if number:
        indices = [index for index in indices if str(index) == number]
    if not indices:
        available = ", ".join(
            f"{kind}:{index}" if kind != "cpu" else kind for kind in kinds for index in range(kinds[kind])
        )
        raise UsageError(f"--device {name} is not available; choose from {available}")
    return [torch.device("cpu") if kind == "cpu" else torch.device(kind, index) for index in indices]


def device_name(device: torch.device) -> str:
    """Return the device with its model name, if torch reports one."""
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_name"):
        return str(device)
    return f"{device} ({module.get_device_name(device)})"
