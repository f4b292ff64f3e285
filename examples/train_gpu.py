"""Train three replicas of a small network in one process, on the GPUs of this machine or on its CPU.

    python examples/train_gpu.py

Run `pip install .` first, or set PYTHONPATH=. in a checkout. The data are the 8 x 8 digits of scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from parle_gpu import Parle

devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
devices = [devices[a % len(devices)] for a in range(3)]  # one per replica, round-robin
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
dataset = TensorDataset(images[:-360], labels[:-360])
loaders = [DataLoader(dataset, batch_size=64, shuffle=True) for _ in devices]  # each replica has its own data order
*replicas, evaluation_model = (nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)) for _ in range(4))
replicas = [replica.to(device) for replica, device in zip(replicas, devices, strict=True)]
optimizer = Parle([replica.parameters() for replica in replicas], lr=0.1, batches_per_epoch=len(loaders[0]))
for data_pass in range(1, 26):
    for batches in zip(*loaders, strict=True):
        optimizer.zero_grad()
        for replica, device, (inputs, targets) in zip(replicas, devices, batches, strict=True):
            F.cross_entropy(replica(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()  # every 25th call synchronizes the replicas
    if data_pass % 5 == 0:
        optimizer.copy_master_to(evaluation_model)
        accuracy = (evaluation_model(images[-360:]).argmax(1) == labels[-360:]).float().mean()
        print(f"pass {data_pass}: master accuracy on 360 held-out images {100 * accuracy:.1f} %", flush=True)
