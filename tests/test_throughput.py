import platform

import pytest

from benchmarks import record, throughput

# Page faults in a round of LeNet, once the first two have got their memory
FAULTS = """
import resource, torch
from mpi4py import MPI
import engine, loader, models
from parle_mpi import Parle
torch.set_num_threads(1)
images, labels = torch.randint(255, (500, 28, 28, 1), dtype=torch.uint8), torch.randint(10, (500,))
data = loader.Dataset("random", images, labels, images, labels, torch.zeros(1), torch.ones(1), 10)
batches = loader.Batches(data, batch_size=100, seed=0)
model = models.build("lenet", 1, 28, 10)
optimizer = Parle(model.parameters(), MPI.COMM_SELF, lr=0.1, batches_per_epoch=batches.per_epoch)
events = engine.train([model], [batches], optimizer, dict, epochs=1, lr_drops=[], lr_decay=1.0)
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(3) if next(events)]
print(faults[2] - faults[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is tuned")
def test_a_round_gets_no_memory_from_the_kernel(python):
    run = python("-c", FAULTS)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 10_000  # without _keep_freed_memory 45,000


def rows(ranks):
    loop = dict(parle=[2.0, 2.0, 2.0], alone=[1.0, 1.5, 1.9], plain=[4.0, 4.0, 4.0])
    sync = dict(step=[1.0] * 3, allreduce=[1e-3] * 3, sync=[3e-3] * 3, message=[1.1e-3] * 3)
    of_a_core = dict(parle=[1.6, 1.6, 1.6], alone=[0.4, 0.8, 1.2], plain=[2.4, 2.4, 2.4])
    yield dict(part="loop", network="lenet", ranks=ranks, seconds=loop, core_seconds=of_a_core)
    yield dict(part="sync", network="lenet", ranks=ranks, seconds=sync, core_seconds=sync)


def test_table_gives_medians_and_quartiles_turn_by_turn(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for row in rows(2):
        record.keep(throughput.QUESTION, row)
    table = throughput.table()
    # 3,200 images in 2 s on each of two ranks; 1.6 core-seconds for 6,400
    cells = [
        "2",
        "1,600",
        "0.75 (0.50 to 0.95)",
        "0.50 (0.25 to 0.75)",
        "2.00 (2.00 to 2.00)",
        "0.250 (0.250 to 0.250)",
    ]
    assert "| " + " | ".join(cells) + " |" in table
    assert "| lenet | 2 | 1.00 | 1.10 | 3.00 | 1.10 (1.10 to 1.10) | 3.00 (3.00 to 3.00) |" in table
