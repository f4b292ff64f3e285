"""Train three replicas of a small network in one process, on the GPUs of this machine or on its CPU.

    python examples/train_gpu.py

Run `pip install .` first, or set PYTHONPATH=. in a checkout. The labels come from a random teacher network.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from parle_gpu import Parle

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
inputs = torch.randn(5000, 16)
labels = teacher(inputs).argmax(1)
train_set, (test_inputs, test_labels) = TensorDataset(inputs[:4000], labels[:4000]), (inputs[4000:], labels[4000:])

devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
devices = [devices[a % len(devices)] for a in range(3)]  # one per replica, round-robin
loaders = [DataLoader(train_set, batch_size=100, shuffle=True) for _ in devices]  # each replica has its own data order
*replicas, evaluation_model = (nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(4))
replicas = [replica.to(device) for replica, device in zip(replicas, devices, strict=True)]
optimizer = Parle([replica.parameters() for replica in replicas], lr=0.1, batches_per_epoch=len(loaders[0]))
for data_pass in range(1, 16):
    for batches in zip(*loaders, strict=True):
        optimizer.zero_grad()
        for replica, device, (batch, targets) in zip(replicas, devices, batches, strict=True):
            F.cross_entropy(replica(batch.to(device)), targets.to(device)).backward()
        optimizer.step()  # every 25th call synchronizes the replicas
    if data_pass % 5 == 0:
        optimizer.copy_master_to(evaluation_model)
        accuracy = (evaluation_model(test_inputs).argmax(1) == test_labels).float().mean()
        print(f"pass {data_pass}: master accuracy on held-out data {100 * accuracy:.1f} %", flush=True)
