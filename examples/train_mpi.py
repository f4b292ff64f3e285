"""Train one replica of a small network per MPI rank, on the 8 x 8 digits of scikit-learn.

    mpiexec -n 3 python -m mpi4py examples/train_mpi.py

Run `pip install .` first, or set PYTHONPATH=. in a checkout. `-m mpi4py` ends all ranks when one of them fails.
"""

import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from parle_mpi import Parle

comm = MPI.COMM_WORLD
torch.set_num_threads(1)  # by default every rank would start one thread per core
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
batches = DataLoader(TensorDataset(images[:-360], labels[:-360]), batch_size=64, shuffle=True)
model, evaluation_model = (nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)) for _ in range(2))
optimizer = Parle(model.parameters(), comm, lr=0.1, batches_per_epoch=len(batches))  # broadcasts rank 0's weights
torch.manual_seed(comm.rank)  # from here on the replicas must differ: in data order, augmentation and dropout
for data_pass in range(1, 26):
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()  # every 25th call synchronizes the replicas
    if data_pass % 5 == 0 and comm.rank == 0:
        optimizer.copy_master_to(evaluation_model)
        accuracy = (evaluation_model(images[-360:]).argmax(1) == labels[-360:]).float().mean()
        print(f"pass {data_pass}: master accuracy on 360 held-out images {100 * accuracy:.1f} %", flush=True)
