"""Train one replica of a small transformer per rank, with AdamW inside Parle, to predict the next character.

    mpiexec -n 3 python -m mpi4py examples/train_char_lm.py
    torchrun --nproc-per-node 3 examples/train_char_lm.py

Run `pip install .` first, or set PYTHONPATH=. in a checkout. The text is the source code of Python's standard library.
"""

import math
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from parle_mpi import Parle

CONTEXT, WIDTH, BATCH_SIZE, STEPS, WARMUP = 64, 96, 24, 400, 40

if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
    torch.distributed.init_process_group("gloo")
    comm, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
else:
    from mpi4py import MPI

    comm, rank = MPI.COMM_WORLD, MPI.COMM_WORLD.rank


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        nn.init.normal_(self.embedding.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, characters):
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        hidden = self.layers(self.embedding(characters) + self.positions, mask=mask, is_causal=True)
        return F.linear(hidden, self.embedding.weight)  # tied weights


def loss_of(model, windows):
    """Return the mean loss in nats per character of (batch, CONTEXT + 1) characters."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


torch.set_num_threads(1)
torch.manual_seed(0)
files = sorted(Path(os.__file__).parent.glob("*.py"))
text = "".join(path.read_text("utf-8") for path in files).encode("ascii", "replace")
windows = torch.tensor(list(text)).unfold(0, CONTEXT + 1, CONTEXT)
train, test = windows[:-500], windows[-500:]
model = Transformer()
optimizer = Parle(
    model.parameters(),
    comm,
    inner=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
    batches_per_epoch=len(train) // BATCH_SIZE,
)
cosine = LambdaLR(optimizer, lambda step: min(step / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)))
torch.manual_seed(rank)  # from here on the replicas must differ
for step in range(1, STEPS + 1):
    optimizer.zero_grad()
    loss_of(model, train[torch.randint(len(train), (BATCH_SIZE,))]).backward()
    optimizer.step()  # every 25th call synchronizes the replicas
    cosine.step()
    if step % 100 == 0:
        with optimizer.master_weights(), torch.no_grad():
            loss = loss_of(model, test)
        if rank == 0:
            print(f"step {step}: master's loss on held-out text {loss:.3f} nats per character", flush=True)
