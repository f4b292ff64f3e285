"""The modules that importing a class loads, and the direction of imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLASS_MODULES = {
    *("parle", "parle.algorithm", "parle.flat_replica", "parle.inner", "parle.validation"),
    *("parle.agreement", "parle.optimizer", "parle.distributed"),
}
LAYERS = [
    *("algorithm", "flat_replica", "inner", "validation", "agreement", "optimizer", "distributed", "cores"),
    *("evaluation", "training", "streams", "launcher", "rank_exit", "supervision", "signals", "checkpoint"),
    *("fault_injection", "logger", "cli", "experiment", "doctor", "plot"),
]
USER_MODULES = ("models", "loader", "engine", "report", "checkpoint", "options", "ranks", "training")


def run(folder, program):
    path = folder / "user.py"
    path.write_text(program)
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, path], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["parle_mpi", "parle_gpu"])
def test_importing_a_class_loads_no_more_than_it_needs(module, tmp_path):
    program = f"import sys, torch, numpy; before = set(sys.modules)\nimport {module}\nprint(*set(sys.modules) - before)"
    loaded = run(tmp_path, program).split()
    external = {name for name in loaded if name.split(".")[0] not in {*sys.stdlib_module_names, "torch", "numpy"}}
    assert external - {module} <= CLASS_MODULES


def test_classes_work_beside_a_users_own_modules(tmp_path):
    for name in USER_MODULES:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    program = """
import sys
import torch
from mpi4py import MPI
import models, loader, engine, report, checkpoint, options, ranks, training
import parle_gpu, parle_mpi
for module in (models, loader, engine, report, checkpoint, options, ranks, training):
    assert module.MINE
settings = dict(lr=0.1, batches_per_epoch=1, sync_every=1)
for build in (
    lambda weight: parle_gpu.Parle([[weight]], **settings),
    lambda weight: parle_mpi.Parle([weight], MPI.COMM_SELF, **settings),
):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build(weight)
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    print(bool(optimizer.master.sum() < 2))
print("torch._dynamo" in sys.modules)
"""
    assert run(tmp_path, program).split() == ["True", "True", "False"]  # torch._dynamo takes seconds to import


def test_imports_run_one_way():
    assert sorted(LAYERS) == sorted(path.stem for path in (ROOT / "parle").glob("[a-z]*.py"))
    for number, layer in enumerate(LAYERS):
        tree = ast.parse((ROOT / "parle" / f"{layer}.py").read_text())
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "parle":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("parle."):
                names.add(node.module.removeprefix("parle."))
            elif isinstance(node, ast.ImportFrom | ast.Import):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not {"parle_mpi", "parle_gpu"} & set(modules), layer
                names |= {name.removeprefix("parle.") for name in modules if name.startswith("parle.")}
        assert names <= set(LAYERS[:number]), layer
