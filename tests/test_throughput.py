import platform

import pytest

from benchmarks import results, throughput

# Page faults in the third round of LeNet, when its memory has been allocated
PAGE_FAULTS = """
import resource, torch
from mpi4py import MPI
import loader, models
from parle import training
from parle_mpi import Parle
torch.set_num_threads(1)
images, labels = torch.randint(255, (500, 28, 28, 1), dtype=torch.uint8), torch.randint(10, (500,))
data = loader.Dataset("random", images, labels, images, labels, torch.zeros(1), torch.ones(1), 10)
batches = loader.BatchLoader(data, batch_size=100, seed=0)
model = models.build("lenet", 1, 28, 10)
optimizer = Parle(model.parameters(), MPI.COMM_SELF, lr=0.1, batches_per_epoch=batches.per_epoch)
replica = training.LocalReplica(0, model, batches)
events = training.train([replica], optimizer, training.Schedule(epochs=1), evaluate=dict)
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(3) if next(events)]
print(faults[2] - faults[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is tuned")
def test_a_round_takes_no_memory_from_the_kernel(python):
    run = python("-c", PAGE_FAULTS)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 10_000  # 45,000 if freed memory is returned to the kernel


def test_table_shows_medians_and_quartiles(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    loop = dict(parle=[2.0, 2.0, 2.0], forward_backward=[1.0, 1.5, 1.9], reference_loop=[4.0, 4.0, 4.0])
    cores = dict(parle=[1.6, 1.6, 1.6], forward_backward=[0.4, 0.8, 1.2], reference_loop=[2.4, 2.4, 2.4])
    sync = dict(step=[1.0] * 3, allreduce=[1e-3] * 3, sync=[3e-3] * 3, communication=[1.1e-3] * 3)
    for measurement, seconds, core_seconds in (("loop", loop, cores), ("sync", sync, sync)):
        row = dict(measurement=measurement, network="lenet", ranks=2)
        results.append_row("throughput", row | dict(seconds=seconds, core_seconds=core_seconds))
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
