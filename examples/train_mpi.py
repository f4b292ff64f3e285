"""Train one replica of a small network per MPI rank.

    mpiexec -n 3 python -m mpi4py examples/train_mpi.py

Run `pip install .` first, or set PYTHONPATH=. in a checkout. `-m mpi4py` ends all ranks when one of them fails. The
labels come from a random teacher network.
"""

import torch
from mpi4py import MPI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from parle_mpi import Parle

torch.set_num_threads(1)  # by default every rank would start one thread per core
torch.manual_seed(0)  # all ranks build the same teacher and data
teacher = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
inputs = torch.randn(5000, 16)
labels = teacher(inputs).argmax(1)
batches = DataLoader(TensorDataset(inputs[:4000], labels[:4000]), batch_size=100, shuffle=True)
test_inputs, test_labels = inputs[4000:], labels[4000:]

comm = MPI.COMM_WORLD
model, evaluation_model = (nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(2))
optimizer = Parle(model.parameters(), comm, lr=0.1, batches_per_epoch=len(batches))  # broadcasts rank 0's weights
torch.manual_seed(comm.rank)  # from here on the replicas must differ: in data order, augmentation and dropout
for data_pass in range(1, 16):
    for batch, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()  # every 25th call synchronizes the replicas
    if data_pass % 5 == 0 and comm.rank == 0:
        optimizer.copy_master_to(evaluation_model)
        accuracy = (evaluation_model(test_inputs).argmax(1) == test_labels).float().mean()
        print(f"pass {data_pass}: master accuracy on held-out data {100 * accuracy:.1f} %", flush=True)
