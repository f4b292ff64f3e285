"""Compare methods that train a small transformer with AdamW to predict the next character.

    python benchmarks/char_lm.py select      # try every setting on validation text
    python benchmarks/char_lm.py test        # test the selected settings on other text
    python benchmarks/char_lm.py --table     # print the tables

The text is the source code of Python's standard library: the files are shuffled and split into 80 % for training, 10 %
for validation and 10 % for testing. Every method uses AdamW with the same weight decay, and a cosine schedule of lr
after a linear warm-up. A trial trains its replicas one after another on one thread with parle_gpu.Parle on the CPU;
trials run in parallel, one per core.
"""

import argparse
import functools
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import results
from benchmarks.compare_methods import compare
from benchmarks.trials import end_round
from parle.cores import count_cores
from parle_gpu import Parle

NAME = Path(__file__).stem
CONTEXT, WIDTH, NUM_HEADS, NUM_BLOCKS, VOCABULARY = 64, 96, 4, 2, 128
STEPS, WARMUP, BATCH_SIZE = 1000, 50, 24
NUM_EVAL_WINDOWS = 2000
SELECTION_SEED, TEST_SEEDS = 42, (43, 44, 45)

Config = dict[str, Any]  # changes to DEFAULTS
DEFAULTS: Config = dict(
    **dict(replicas=3, sync_every=25, gamma=0.01, rho=0.01, alpha=0.75, outer_lr_scale=0.9, outer_momentum=0.0),
    **dict(reset_replicas=False, lr=3e-3, weight_decay=0.1, batch_size=BATCH_SIZE, steps=STEPS),
)
ADAMW: Config = dict(replicas=1, sync_every=1, gamma=0.0, rho=0.0)
AVERAGING: Config = dict(gamma=0.0, rho=0.0, alpha=0.0, reset_replicas=True)  # all restart from the master
LRS = (1.5e-3, 3e-3, 6e-3)
# method → the settings tried; data-parallel AdamW is one worker with the mini-batches of three
GRIDS: dict[str, list[Config]] = {
    "AdamW": [ADAMW | dict(lr=lr) for lr in LRS],
    "AdamW, data-parallel": [ADAMW | dict(lr=lr, batch_size=3 * BATCH_SIZE) for lr in LRS],
    "AdamW, 3 × the steps": [ADAMW | dict(lr=lr, steps=3 * STEPS) for lr in LRS],
    "local AdamW": [AVERAGING | dict(lr=lr, outer_lr_scale=1.0) for lr in LRS],
    "DiLoCo": [
        AVERAGING | dict(lr=3e-3, outer_lr_scale=outer_lr, outer_momentum=momentum, sync_every=sync_every)
        for sync_every, (outer_lr, momentum) in itertools.product((25, 100), ((0.7, 0.9), (0.3, 0.9), (0.7, 0.5)))
    ],
    "Parle": [dict(lr=lr, rho=rho) for lr, rho in itertools.product(LRS, (0.01, 0.1))],
}
BASELINES = ("AdamW", "AdamW, data-parallel", "AdamW, 3 × the steps", "local AdamW")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](hidden)).unflatten(2, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.project(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norms[1](hidden))


class Transformer(nn.Module):
    """A causal transformer whose output weights are its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS))), nn.LayerNorm(WIDTH)
        for parameter in (self.embedding.weight, self.positions):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        hidden = self.blocks(self.embedding(characters) + self.positions)
        return F.linear(self.norm(hidden), self.embedding.weight)


@functools.cache
def load_text() -> dict[str, Tensor]:
    """Return "train", "validation" and "test" as windows of CONTEXT + 1 characters."""
    files = sorted(Path(random.__file__).parent.rglob("*.py"))
    excluded = {"site-packages", "test", "tests", "idle_test"}
    texts = [path.read_text("utf-8", errors="replace") for path in files if not excluded & set(path.parts)]
    random.Random(0).shuffle(texts)
    characters = torch.tensor(list("".join(texts).encode("ascii", "replace")))
    windows = characters.unfold(0, CONTEXT + 1, CONTEXT)
    bounds = [round(fraction * len(windows)) for fraction in (0.0, 0.8, 0.9, 1.0)]
    return {
        name: windows[start:end]
        for name, (start, end) in zip(("train", "validation", "test"), itertools.pairwise(bounds), strict=True)
    }


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss in nats per character."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    chosen = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:NUM_EVAL_WINDOWS]]
    return sum(loss_of(model, part).item() * len(part) for part in chosen.split(250)) / len(chosen)


def run_trial(config: Config, seed: int, split: str) -> dict[str, Any]:
    """Train once on one thread and return the row; its loss is of the master on this split."""
    torch.set_num_threads(1)
    settings, text, started = DEFAULTS | config, load_text(), time.perf_counter()
    n, steps, batch_size = settings["replicas"], settings["steps"], settings["batch_size"]
    networks = []
    for _ in range(n):
        torch.manual_seed(seed)
        networks.append(Transformer())
    inner = functools.partial(torch.optim.AdamW, lr=settings["lr"], weight_decay=settings["weight_decay"])
    names = ("sync_every", "gamma", "rho", "alpha", "outer_lr_scale", "outer_momentum")
    optimizer = Parle(
        [network.parameters() for network in networks],
        inner=inner,
        batches_per_epoch=len(text["train"]) // batch_size,
        **{name: settings[name] for name in names},
    )
    schedule = LambdaLR(optimizer, lambda step: min(step / WARMUP, (1 + math.cos(math.pi * step / steps)) / 2))
    generators = [torch.Generator().manual_seed(1000 * seed + number) for number in range(n)]
    rounds = 0
    for _ in range(steps):
        optimizer.zero_grad()
        for network, generator in zip(networks, generators, strict=True):
            indices = torch.randint(len(text["train"]), (batch_size,), generator=generator)
            loss_of(network, text["train"][indices]).backward()
        optimizer.step()
        schedule.step()
        if optimizer.step_in_round == 0:
            rounds += 1
            end_round(networks, optimizer, settings | dict(keep_inner_momentum=True))
    optimizer.sync()
    optimizer.copy_master_to(networks[0])
    num_parameters = sum(parameter.numel() for parameter in networks[0].parameters())
    # what each worker sends: a vector per round, or a gradient per step
    sent = rounds if n > 1 else steps * (batch_size > BATCH_SIZE)
    return dict(
        config=config,
        seed=seed,
        split=split,
        loss=evaluate(networks[0], text[split]),
        bytes_sent=4 * num_parameters * sent,
        num_parameters=num_parameters,
        seconds=round(time.perf_counter() - started, 1),
    )


# Selection and tests

Trial = tuple[Config, int, str]


def select_trials() -> Iterator[Trial]:
    for configs in GRIDS.values():
        for config in configs:
            yield config, SELECTION_SEED, "validation"


def test_trials() -> Iterator[Trial]:
    for seed, method in itertools.product(TEST_SEEDS, GRIDS):
        yield selected(method), seed, "test"


def selected(method: str) -> Config:
    """Return the setting with the lowest validation loss."""
    losses = [losses_of(config, "validation") for config in GRIDS[method]]
    if not all(losses):
        raise SystemExit(f"Run the selection first: not every setting of {method} has been tried")
    number = min(range(len(losses)), key=lambda number: losses[number])
    return GRIDS[method][number]


def losses_of(config: Config, split: str) -> list[float]:
    key = config_key(config, split)
    return [row["loss"] for row in results.read_rows(NAME) if config_key(row["config"], row["split"]) == key]


def config_key(config: Config, split: str) -> str:
    return json.dumps([DEFAULTS | config, split], sort_keys=True)


def run_missing(trials: Iterator[Trial]) -> None:
    """Run the trials without a row, in parallel, and append their rows."""
    provenance = results.provenance()
    known = {(config_key(row["config"], row["split"]), row["seed"]) for row in results.read_rows(NAME)}
    jobs = [trial for trial in trials if (config_key(trial[0], trial[2]), trial[1]) not in known]
    if not jobs:
        print(results.nothing_to_run(NAME))
    with ProcessPoolExecutor(count_cores(), mp_context=get_context("spawn")) as pool:
        for number, trial in enumerate(as_completed([pool.submit(run_trial, *job) for job in jobs]), 1):
            row = trial.result()
            results.append_row(NAME, row | provenance)
            print(f"{number}/{len(jobs)}  {row['config']}  seed {row['seed']}: {row['loss']:.3f}", flush=True)


# Tables


def describe(config: Config) -> str:
    """Return what distinguishes a setting from the others of its method."""
    names = dict(lr="lr", rho="ρ", sync_every="L", outer_lr_scale="outer step", outer_momentum="outer momentum")
    shown = {"lr"} | ({"sync_every", "outer_lr_scale", "outer_momentum"} if "outer_momentum" in config else set())
    shown |= {"rho"} if "gamma" not in config else set()
    return ", ".join(f"{text} {config[name]:g}" for name, text in names.items() if name in shown)


def selection() -> str:
    lines = []
    for method, configs in GRIDS.items():
        for config in configs:
            losses = losses_of(config, "validation")
            if losses:
                lines.append([method, describe(config), f"{losses[0]:.3f}"])
    return results.markdown_table(["method", "setting", "validation loss, nats per character"], lines)


def table() -> str:
    """Return the test losses with the selected settings, compared with the baselines."""
    lines = []
    for method in GRIDS:
        config = DEFAULTS | selected(method)
        losses = losses_of(selected(method), "test")
        if losses:
            theirs = {name: losses_of(selected(name), "test") for name in BASELINES}
            against = ["" if name == method else compare(losses, theirs[name], digits=3) for name in BASELINES]
            rows = [row for row in results.read_rows(NAME) if row["config"] == selected(method)]
            cells = [f"{config['steps']:,}", f"{config['steps'] * config['replicas'] * config['batch_size']:,}"]
            cells += [f"{rows[0]['bytes_sent'] / 1e6:,.0f}", results.mean_std(losses, 3)]
            lines.append([method, describe(selected(method)), *cells, *against])
    header = ["method", "selected setting", "steps per worker", "windows in total", "MB sent per worker"]
    header += ["test loss, nats per character", *(f"against {name}" for name in BASELINES)]
    return results.markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("select", "test"), nargs="?", help="what to run (default: both)")
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    args = parser.parse_args()
    if args.table:
        print(selection(), end="\n\n", flush=True)  # which may be incomplete
        print(table())
        return
    if args.stage != "test":
        run_missing(select_trials())
    if args.stage != "select":
        run_missing(test_trials())


if __name__ == "__main__":
    main()
