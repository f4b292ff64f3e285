"""The command line, the same for both programs: its flags, their defaults, and one line on what is wrong with them."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import torch

from loader import SOURCES
from models import COMMON, RECIPES
from parle import checkpoint, distributed, launcher
from parle.algorithm import PRESETS


class Mistake(Exception):
    """A user's mistake. The message says what to type instead."""


def tell(prog: str, mistake: Exception) -> None:
    """One line, from the first rank."""
    if _is_first_rank():
        sys.stderr.write(f"{prog}: error: {distributed.reason(mistake)}\n")
        sys.stderr.flush()


def _is_first_rank() -> bool:
    rank, _ = launcher.launched() or (0, None)
    return rank == 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(message)

    def print_help(self, *arguments: Any) -> None:
        if _is_first_rank():
            super().print_help(*arguments)

    def parse_args(self, *arguments: Any) -> argparse.Namespace:
        args, unknown = self.parse_known_args(*arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else f"python {self.prog} -h lists what there is"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return args


def _number(kind: Callable[[str], Any], holds: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return convert


def _one_of(names: Collection[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            near = difflib.get_close_matches(text, names, 1, cutoff=0.4)
            hint = f", did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"there is no {text}{hint} (there are {', '.join(names)})")
        return text

    return convert


SEED = _number(int, lambda value: 0 <= value < 2**63, "a whole number of at least 0, such as 42")
REPLICAS = _number(int, lambda value: 1 <= value <= 10_000, "a whole number of at least 1 and up to 10000, such as 3")
COUNT = _number(int, lambda value: value >= 1, "a whole number of at least 1, such as 3")
BATCH = _number(int, lambda value: value >= 2, "a whole number of at least 2 (batch norm needs two), such as 128")
COEFFICIENT = _number(float, lambda value: 0 <= value <= 1e6, "a number of at least 0 and up to 1e6, such as 0.01")
POSITIVE = _number(float, lambda value: 0 < value < math.inf, "a number above 0, such as 0.25")
EPOCHS = _number(float, lambda value: 0 < value <= 1e9, "a number above 0 and up to 1e9, such as 0.25")
DECAY = _number(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1, such as 0.75")
SHARE = _number(float, lambda value: 0 < value <= 1, "a number above 0 and up to 1, such as 0.5")


def _folder(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("a folder needs a name, such as . for this one")
    return Path(text)


LONGEST = 10**9  # mini-batches of a round
MOST_THREADS = 1024  # far more than any node's cores; what OpenMP cannot start ends the program
LENGTH = _number(
    lambda text: text if text == "auto" else int(text),
    lambda value: value == "auto" or 1 <= value <= LONGEST,
    "a whole number of at least 1 and up to 1e9, such as 25, or auto",
)


def parser(prog: str, description: str) -> Parser:
    """All flags. One that is not given stays None where its default depends on others: see `resolve`."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parle, models, sets, methods = PRESETS["parle"], ", ".join(RECIPES), ", ".join(SOURCES), ", ".join(PRESETS)

    add = parser.add_argument_group("what to train").add_argument
    add("-m", "--model", type=_one_of(RECIPES), default="lenet", metavar="NAME", help=f"{models} (%(default)s)")
    add("-d", "--dataset", type=_one_of(SOURCES), metavar="NAME", help=f"{sets} (the model's)")
    add("-s", "--seed", type=SEED, default=42, metavar="N", help="of weights, data order and dropout (%(default)s)")

    add = parser.add_argument_group("the algorithm").add_argument
    add("-n", "--replicas", type=REPLICAS, metavar="N", help="replicas (a launcher's number of ranks, else 3)")
    add("--method", type=_one_of(PRESETS), default="parle", metavar="NAME", help=f"{methods} (%(default)s)")
    add("-L", "--sync-every", type=LENGTH, metavar="L", help=f"mini-batches a round, or auto ({parle['sync_every']})")
    add("--gamma", type=COEFFICIENT, metavar="X", help=f"pull towards the anchor, 0 is none ({parle['gamma']})")
    add("--rho", type=COEFFICIENT, metavar="X", help=f"pull towards the mean, 0 is none ({parle['rho']})")
    add("--alpha", type=DECAY, default=0.75, metavar="X", help="what the inner average keeps (%(default)s)")
    add("--outer-step", type=COEFFICIENT, default=1.0, metavar="X", help="outer step in units of lr (%(default)s)")
    add("--outer-momentum", type=DECAY, metavar="X", help="of the outer step (as --momentum)")

    add = parser.add_argument_group("the recipe").add_argument
    add("-b", "--batch-size", type=BATCH, metavar="N", help=f"of each replica ({COMMON['batch_size']})")
    add("-B", "--epochs", type=EPOCHS, metavar="X", help="of L passes over the data each (the model's)")
    add("--lr", type=COEFFICIENT, metavar="X", help=f"of the inner and the outer step ({COMMON['lr']})")
    add("--lr-drops", type=EPOCHS, nargs="*", metavar="X", help="epochs at which lr drops (the model's)")
    add("--lr-decay", type=POSITIVE, metavar="X", help=f"factor of lr at a drop ({COMMON['lr_decay']})")
    add("--momentum", type=DECAY, metavar="X", help=f"Nesterov's ({COMMON['momentum']})")
    add("--weight-decay", type=COEFFICIENT, metavar="X", help="in the inner step alone (the model's)")
    add("--dropout", type=DECAY, metavar="X", help="of the network (the model's)")

    add = parser.add_argument_group("data").add_argument
    add("--augment", action=argparse.BooleanOptionalAction, help="flip and crop at random (for CIFAR)")
    add("--whiten", action="store_true", help="contrast normalisation and ZCA instead of mean and std")
    add("--frac", type=SHARE, default=1.0, metavar="X", help="of the data, what each replica sees (%(default)s)")
    add("--data", type=_folder, metavar="DIR", help="raw data, as torchvision lays it out (downloaded to PROC/raw)")
    add("--proc", type=_folder, default=Path("proc"), metavar="DIR", help="pre-processed data (%(default)s)")

    add = parser.add_argument_group("the run").add_argument
    add("--out", type=_folder, metavar="DIR", help="its folder (runs/TIME-MODEL-DATASET)")
    add("--eval-every", type=COUNT, metavar="N", help="rounds between evaluations, besides every epoch's end")
    add("--checkpoint-every", type=COUNT, metavar="N", help="rounds between checkpoints, besides every epoch's end")
    add(
        "--resume",
        type=_folder,
        nargs="?",
        const=True,
        metavar="DIR",
        help="go on from a run's folder or a checkpoint",
    )
    add(
        "--on-nan",
        type=_one_of(("restart", "stop")),
        default="restart",
        metavar="NAME",
        help="restart the replica, or stop",
    )
    add("--doctor", action="store_true", help="tell what is here and what synchronization costs; train nothing")
    add("--timeout", type=POSITIVE, default=1800.0, metavar="S", help="seconds to wait for other ranks (%(default)g)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, … (%(default)s)")
    add("--amp", type=_one_of(("off", "bf16")), default="off", metavar="NAME", help="off or bf16 (%(default)s)")
    return parser


def parse(parser: Parser) -> argparse.Namespace:
    """The command line. A run that is resumed has the arguments that it had, but for those given anew.

    `resume` becomes the checkpoint that was named, or the folder of a run's checkpoints. Raises: Mistake.
    """
    args = parser.parse_args()
    args.program = parser.prog
    if args.resume is None:
        return args
    folder = args.out if args.resume is True else args.resume
    if folder is None:
        raise Mistake("--resume needs the folder of the run: --resume DIR")
    named = os.path.exists(folder / checkpoint.MANIFEST)
    if named:
        folder = folder.resolve()
    try:
        paths = [folder] if named else checkpoint.found(folder / checkpoint.FOLDER)
        _, manifest, _ = checkpoint.newest(paths, files=False)
    except (checkpoint.CheckpointError, OSError) as error:
        raise Mistake(f"--resume {folder}: {error}") from error
    run = folder if not named else folder.parent.parent if folder.parent.name == checkpoint.FOLDER else None
    arguments = manifest["arguments"] | dict(out=run and str(run))
    if launcher.STARTED not in os.environ and (launcher.launched() or (0, 1))[1] != 1:
        del arguments["replicas"]  # as many as there are ranks now, unless -n says otherwise
    if PRESETS[arguments["method"]]["rho"] == "1/n" and arguments["rho"] == 1 / manifest["replicas"]:
        del arguments["rho"]  # with another n another one
    parser.set_defaults(**arguments)
    args = parser.parse_args()
    args.program = parser.prog
    for name in ("model", "dataset", "whiten", "method"):
        if getattr(args, name) != arguments[name]:
            raise Mistake(f"--resume: {folder} has {name} {arguments[name]}, not {getattr(args, name)}")
    args.resume = folder if named else run / checkpoint.FOLDER
    return args


def resolve(args: argparse.Namespace, size: int | None) -> argparse.Namespace:
    """Fill in what follows from the method, the model and the data set. `size` is the launcher's number of ranks.

    A recipe is for the usual L; with another one its epochs stand for as many mini-batches, so more of them if L is 1.
    """
    defaults: dict[str, Any] = {"replicas": size or 3, **COMMON, **RECIPES[args.model]}
    defaults |= {name: value for name, value in PRESETS[args.method].items() if value is not None}
    length = args.sync_every or defaults["sync_every"]
    if length != "auto":
        scale = PRESETS["parle"]["sync_every"] / length
        defaults["epochs"] *= scale
        defaults["lr_drops"] = [drop * scale for drop in defaults["lr_drops"]]
    resolved = argparse.Namespace(**vars(args))
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(resolved, name, default)
    if resolved.rho == "1/n":
        resolved.rho = 1 / resolved.replicas
    if resolved.outer_momentum is None:
        resolved.outer_momentum = resolved.momentum
    if resolved.augment is None:
        resolved.augment = SOURCES[resolved.dataset].augment
    return resolved


def check(args: argparse.Namespace, size: int | None) -> None:
    """What `resolve` gave, as a whole, on `size` ranks. Raises: Mistake."""
    if args.sync_every == "auto" and not args.gamma:
        raise Mistake("-L auto needs a pull towards the anchor: --gamma 0.01")
    if args.sync_every == "auto" and args.lr > LONGEST * args.gamma:
        raise Mistake(f"-L auto is lr / gamma, and {args.lr:g} / {args.gamma:g} is too long: --gamma 0.01")
    threads = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]
    if not (threads.strip().isdecimal() and len(threads) < 9 and 1 <= int(threads) <= MOST_THREADS):
        raise Mistake(f"OMP_NUM_THREADS is {threads!r}, not a number of threads from 1 to {MOST_THREADS}")
    if args.data is not None and not os.path.isdir(args.data):
        raise Mistake(f"--data {args.data}: there is no such folder")
    if size is None:
        return
    if size % args.replicas:
        fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise Mistake(
            f"{size} ranks cannot be shared equally by -n {args.replicas} replicas: use -n with one of {fits}"
        )
    per_replica = size // args.replicas
    if args.batch_size < 2 * per_replica:
        raise Mistake(
            f"-b {args.batch_size} leaves less than 2 images for each of {per_replica} ranks of a replica: "
            f"-b {2 * per_replica} or more"
        )


def devices(name: str) -> list[torch.device]:
    """All devices of this machine that `name` means: a numbered one is itself alone. Raises: Mistake."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = {"cpu": 1} if accelerator is None else {accelerator.type: torch.accelerator.device_count(), "cpu": 1}
    if name == "auto":
        name = next(iter(kinds))
    kind, _, number = name.partition(":")
    indices = range(kinds.get(kind, 0))
    if number:
        indices = [index for index in indices if str(index) == number]
    if not indices:
        there = ", ".join(
            f"{kind}:{index}" if kind != "cpu" else kind for kind in kinds for index in range(kinds[kind])
        )
        raise Mistake(f"--device {name} is not to be had here: use one of {there}")
    return [torch.device("cpu") if kind == "cpu" else torch.device(kind, index) for index in indices]


def name(device: torch.device) -> str:
    """As people know it: with what an accelerator's maker calls it, where torch can tell."""
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_name"):
        return str(device)
    return f"{device} ({module.get_device_name(device)})"
