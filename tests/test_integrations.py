"""Parle inside other libraries: their wrappers, trainers, schedulers and checkpoints.

The reference is torch.optim.SGD or a plain loop. Tests of a library that is not installed are skipped; peft,
pytorch-ignite and skorch are covered as well.

pip install accelerate lightning safetensors timm transformers && python -m pytest -m slow tests/test_integrations.py
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset

import parle_gpu
import parle_mpi

pytestmark = pytest.mark.slow

SETTINGS = dict(lr=0.1, weight_decay=0.01, sync_every=3, batches_per_epoch=5)


def needs(name):
    """Return a module, or skip the test."""
    return pytest.importorskip(
        name, reason=f"{name.split('.')[0]} is not installed: see the top of test_integrations.py"
    )


class SingleReplica(parle_gpu.Parle):
    """Parle of one replica with the signature that factories of optimizers expect."""

    def __init__(self, params, **settings):
        super().__init__([params], **SETTINGS | settings)


@pytest.fixture(params=["gpu", "mpi"])
def build(request):
    """A function that builds the Parle of one replica, of either class."""
    if request.param == "gpu":
        return SingleReplica
    comm = request.getfixturevalue("comm")
    return lambda parameters, **settings: parle_mpi.Parle(parameters, comm, **SETTINGS | settings)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def start(build):
    """Return a network, the same at every call, with its optimizer and scheduler."""
    torch.manual_seed(1)
    model = network()
    optimizer = build(model.parameters())
    return model, optimizer, lr_scheduler.StepLR(optimizer, 2, 0.7)


def loader():
    """Five mini-batches in a fixed order: rounds of three steps end within and across epochs."""
    random = torch.Generator().manual_seed(7)
    inputs = torch.randn(40, 4, generator=random)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0)), batch_size=8)


def train(model, optimizer, scheduler=None, epochs=1, clip=None):
    """Train with a plain loop, the reference for the loops of others."""
    for inputs, targets in itertools.chain(*(loader() for _ in range(epochs))):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()


def is_same(a, b):
    """Return whether two state_dicts are bitwise identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


# torch


def two_groups(build, **settings):
    """Return the optimizer of two parameters, each in a group with its own learning rate."""
    groups = [dict(params=[nn.Parameter(torch.ones(2))], lr=lr) for lr in (0.1, 0.05)]
    return build(groups, **settings)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def record_schedule(optimizer, scheduler, steps, step):
    """Return the learning rates and momenta of all groups, step by step."""
    record = []
    for index in steps:
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.full((2,), 0.1)
        optimizer.step()
        step(scheduler, index)
        record.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
    return record


TORCH_SCHEDULERS = dict(
    LambdaLR=lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    MultiplicativeLR=lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    StepLR=lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    MultiStepLR=lambda o: lr_scheduler.MultiStepLR(o, [2, 9, 15], 0.2),
    ConstantLR=lambda o: lr_scheduler.ConstantLR(o, 0.5, 6),
    LinearLR=lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 12),
    ExponentialLR=lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    PolynomialLR=lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    CosineAnnealingLR=lambda o: lr_scheduler.CosineAnnealingLR(o, 15, 1e-3),
    CosineAnnealingWarmRestarts=lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, 2),
    CyclicLR=lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=4, mode="triangular2"),
    CyclicLR_momentum=lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 4, base_momentum=0.5, max_momentum=0.95),
    OneCycleLR=lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=21, cycle_momentum=True),
    OneCycleLR_linear=lambda o: lr_scheduler.OneCycleLR(o, [0.2, 0.1], 21, anneal_strategy="linear", three_phase=True),
    ChainedScheduler=lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.2, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    SequentialLR=lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.CosineAnnealingLR(o, 10)], [4]
    ),
    SWALR=lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=8),
    ReduceLROnPlateau=lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1, min_lr=0.01),
)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("sync_every", [1, 3, "auto"])
@pytest.mark.parametrize("name", TORCH_SCHEDULERS)
def test_torch_scheduler_gives_the_rates_of_sgd_and_resumes(build, name, sync_every):
    def step(scheduler, index):
        scheduler.step(*([1 / (1 + index // 4)] if name == "ReduceLROnPlateau" else []))

    schedule = TORCH_SCHEDULERS[name]
    theirs = two_groups(sgd)
    expected = record_schedule(theirs, schedule(theirs), range(20), step)
    ours = two_groups(build, sync_every=sync_every)
    scheduler = schedule(ours)
    assert record_schedule(ours, scheduler, range(10), step) == expected[:10]
    resumed = two_groups(build, sync_every=sync_every)
    resumed_scheduler = schedule(resumed)
    with torch.no_grad():
        for group, source in zip(resumed.param_groups, ours.param_groups, strict=True):
            group["params"][0].copy_(source["params"][0])
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    assert record_schedule(resumed, resumed_scheduler, range(10, 20), step) == expected[10:]


def test_averaged_model_averages_the_weights(build):
    model = network()
    optimizer = build(model.parameters())
    averaged, weights = swa_utils.AveragedModel(model), []
    for _ in range(4):
        train(model, optimizer)
        averaged.update_parameters(model)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    before = weights[-1].clone()
    swa_utils.update_bn(loader(), averaged)
    actual = nn.utils.parameters_to_vector(averaged.module.parameters()).detach()
    torch.testing.assert_close(actual, torch.stack(weights).mean(0))
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint_resumes_bitwise(build, tmp_path, epochs):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

    (model, optimizer, _), (other, resumed, _) = start(build), start(build)
    train(model, optimizer, epochs=epochs)
    saved = get_state_dict(model, optimizer)
    dcp.save(dict(model=saved[0], optimizer=saved[1]), checkpoint_id=tmp_path)
    train(other, resumed, epochs=2)
    template = get_state_dict(other, resumed)
    loaded = dict(model=template[0], optimizer=template[1])
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert is_same(optimizer.state_dict(), resumed.state_dict())
    assert is_same(get_optimizer_state_dict(other, resumed), saved[1])
    train(model, optimizer)
    train(other, resumed)
    assert is_same(model.state_dict(), other.state_dict())


# safetensors


def test_safetensors_saves_and_loads_every_tensor(build, tmp_path):
    safetensors = needs("safetensors.torch")
    model, other = network(), network()
    optimizer = build(model.parameters())
    train(model, optimizer)
    safetensors.save_file(model.state_dict(), tmp_path / "file")
    assert is_same(safetensors.load_file(tmp_path / "file"), dict(model.state_dict()))
    safetensors.save_model(model, tmp_path / "model")
    assert safetensors.load_model(other, tmp_path / "model") == (set(), [])
    assert is_same(other.state_dict(), model.state_dict())
    optimizer.sync()
    optimizer.copy_master_to(other)
    safetensors.save_model(other, tmp_path / "master")
    safetensors.load_model(model, tmp_path / "master")  # between rounds, the weights of one replica are the master
    train(model, optimizer)


# accelerate


@pytest.fixture
def accelerate():
    module = needs("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_trains_like_a_plain_loop(accelerate, build):
    plain = start(build)
    train(*plain, epochs=2, clip=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, scheduler, batches = accelerator.prepare(*start(build), loader())
    for inputs, targets in itertools.chain(batches, batches):
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(inputs), targets))
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
    for ours, theirs in zip((model, optimizer, scheduler), plain, strict=True):
        assert is_same(ours.state_dict(), theirs.state_dict())


def test_accelerate_save_model_keeps_all_tensors(accelerate, build, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, _ = accelerator.prepare(*start(build))
    train(model, optimizer)
    accelerator.save_model(model, tmp_path)
    saved = needs("safetensors.torch").load_file(tmp_path / "model.safetensors")
    assert is_same(saved, dict(model.state_dict()))


def test_accelerate_resumes_bitwise_in_mid_round(accelerate, build, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(*start(build))
    train(*prepared)
    assert prepared[1].optimizer.step_in_round == 2
    accelerator.save_state(tmp_path)
    train(*prepared)
    accelerator = accelerate.Accelerator(cpu=True)
    resumed = accelerator.prepare(*start(build))
    accelerator.load_state(tmp_path)
    train(*resumed)
    for ours, theirs in zip(prepared, resumed, strict=True):
        assert is_same(ours.state_dict(), theirs.state_dict())


def test_accelerate_prepares_several_replicas(accelerate):
    replicas = [network() for _ in range(2)]
    optimizer = parle_gpu.Parle([replica.parameters() for replica in replicas], **SETTINGS)
    *replicas, prepared = accelerate.Accelerator(cpu=True).prepare(*replicas, optimizer)
    for inputs, targets in loader():
        prepared.zero_grad()
        for replica in replicas:
            F.cross_entropy(replica(inputs), targets).backward()
        prepared.step()
    assert optimizer.rounds_done == 1
    assert optimizer.nonfinite_replicas == []


# Lightning


@pytest.fixture
def lightning():
    return needs("lightning.pytorch")


@pytest.fixture
def trainer(lightning, tmp_path):
    """A function that returns a quiet trainer."""
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return lambda **settings: lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet | settings)


@pytest.fixture
def classifier(lightning, build):
    """A module with automatic optimization, for training like the plain loop."""

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.model = network()

        def training_step(self, batch, _):
            inputs, targets = batch
            return F.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self):
            optimizer = build(self.parameters())
            return [optimizer], [dict(scheduler=lr_scheduler.StepLR(optimizer, 2, 0.7), interval="step")]

    return Classifier


@pytest.fixture
def gan(lightning, build):
    """A module with manual optimization: two optimizers, each of which freezes the parameters of the other."""

    class GAN(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.generator, self.discriminator = nn.Linear(3, 4), nn.Linear(4, 1)

        def losses(self, inputs):
            """Yield the loss of the discriminator, then of the generator."""
            fake = self.generator(inputs[:, :3])
            yield F.softplus(self.discriminator(fake.detach())).mean() + F.softplus(-self.discriminator(inputs)).mean()
            yield F.softplus(-self.discriminator(self.generator(inputs[:, :3]))).mean()

        def training_step(self, batch, _):
            losses = self.losses(batch[0])
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(next(losses))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return [build(self.discriminator.parameters()), build(self.generator.parameters(), sync_every=4)]

    return GAN


lightning_warnings = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:.*does not have many workers:UserWarning",
)


@lightning_warnings
@pytest.mark.parametrize("clip", [None, 0.1])
def test_lightning_trains_like_a_plain_loop(trainer, classifier, clip):
    module, plain = classifier(), classifier()
    (optimizer,), (schedule,) = plain.configure_optimizers()
    train(plain.model, optimizer, schedule["scheduler"], epochs=3, clip=clip)
    fitted = trainer(max_epochs=3, gradient_clip_val=clip)
    fitted.fit(module, loader())
    assert is_same(module.state_dict(), plain.state_dict())
    assert is_same(fitted.optimizers[0].state_dict(), optimizer.state_dict())


@lightning_warnings
def test_lightning_trains_two_optimizers_like_a_plain_loop(trainer, gan):
    module, plain = gan(), gan()
    trainer(max_epochs=3).fit(module, loader())
    optimizers = plain.configure_optimizers()
    for inputs, _ in itertools.chain(*(loader() for _ in range(3))):
        for optimizer, loss in zip(optimizers, plain.losses(inputs), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert is_same(module.state_dict(), plain.state_dict())


@lightning_warnings
@pytest.mark.parametrize("name", ["classifier", "gan"])
def test_lightning_resumes_bitwise_in_mid_round(trainer, build, request, tmp_path, name):
    full, module, resumed = (request.getfixturevalue(name)() for _ in range(3))
    trainer(max_epochs=3).fit(full, loader())
    first = trainer(max_epochs=1)
    first.fit(module, loader())
    assert all(optimizer.step_in_round for optimizer in first.optimizers)
    first.save_checkpoint(tmp_path / "checkpoint")
    trainer(max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "checkpoint")
    assert is_same(resumed.state_dict(), full.state_dict())


def test_fabric_trains_like_a_plain_loop_and_resumes_bitwise(build, tmp_path):
    fabric = needs("lightning.fabric").Fabric(accelerator="cpu")

    def train_with_fabric(model, optimizer):
        for inputs, targets in fabric.setup_dataloaders(loader()):
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()

    plain = start(build)[:2]
    train(*plain, epochs=2)
    saved, resumed = (fabric.setup(*start(build)[:2]) for _ in range(2))
    train_with_fabric(*saved)
    fabric.save(tmp_path / "checkpoint", dict(model=saved[0], optimizer=saved[1]))
    train_with_fabric(*saved)
    fabric.load(tmp_path / "checkpoint", dict(model=resumed[0], optimizer=resumed[1]))
    train_with_fabric(*resumed)
    for ours, theirs, reference in zip(saved, resumed, plain, strict=True):
        assert is_same(ours.state_dict(), reference.state_dict())
        assert is_same(theirs.state_dict(), reference.state_dict())


# timm: its factory of optimizers, the checks of its tests/test_optim.py, and its schedulers


@pytest.fixture
def create(monkeypatch):
    """timm's factory, with Parle among its optimizers."""
    factory, info = needs("timm.optim._optim_factory"), needs("timm.optim").OptimInfo
    registry = copy.deepcopy(factory.default_registry)
    registry.register(info("parle", SingleReplica, has_eps=False, has_momentum=True))
    monkeypatch.setattr(factory, "default_registry", registry)
    return lambda parameters, **settings: factory.create_optimizer_v2(parameters, opt="parle", **settings)


TIMM_VARIANTS = {  # the parameters of the factory for a weight and a bias, and its settings
    "one group": (lambda weight, bias: [weight, bias], dict(lr=1e-3)),
    "two groups": (lambda weight, bias: [dict(params=[weight]), dict(params=[bias], lr=1e-2)], dict(lr=1e-3)),
    "bias only": (lambda weight, bias: [dict(params=bias, lr=1e-2)], dict(lr=1e-3)),
    "momentum": (lambda weight, bias: [weight, bias], dict(lr=3e-3, momentum=0.99)),
    "weight decay": (lambda weight, bias: [weight, bias], dict(lr=3e-3, momentum=0.99, weight_decay=0.1)),
}
every_variant = pytest.mark.parametrize("variant", TIMM_VARIANTS)
every_period = pytest.mark.parametrize("sync_every", [1, 3, 25, "auto"])


def linear_problem(create, variant, weight, bias, inputs, **settings):
    """Return parameters, their optimizer and its closure, for the sum of squares of `weight @ inputs + bias`."""
    weight, bias, inputs = nn.Parameter(weight.detach()), nn.Parameter(bias.detach()), nn.Parameter(inputs)
    arrange, own = TIMM_VARIANTS[variant]
    optimizer = create(arrange(weight, bias), **own | settings)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).square().sum()
        loss.backward()
        return loss

    return (weight, bias), optimizer, closure


@every_variant
@every_period
def test_timm_state_dict_resumes_bitwise_in_a_new_optimizer(create, variant, sync_every):
    inputs = torch.randn(5)
    ours, optimizer, closure = linear_problem(
        create, variant, torch.randn(10, 5), torch.randn(10), inputs, sync_every=sync_every
    )
    for _ in range(20):
        optimizer.step(closure)
    copies = [parameter.detach().clone() for parameter in ours]
    theirs, other, its_closure = linear_problem(create, variant, *copies, inputs, sync_every=sync_every)
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(state)
    assert is_same(state, optimizer.state_dict())
    for _ in range(20):
        optimizer.step(closure)
        other.step(its_closure)
        assert all(map(torch.equal, ours, theirs))
    assert is_same(optimizer.state_dict(), other.state_dict())
    other.param_groups.extend(other.param_groups)
    assert is_same(optimizer.state_dict()["param_groups"][-1], other.state_dict()["param_groups"][-1])


@every_variant
@every_period
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_timm_linear_problem_is_minimized(create, variant, sync_every, contiguous):
    weight, bias = torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    _, optimizer, closure = linear_problem(create, variant, weight, bias, torch.randn(5), sync_every=sync_every)
    assert repr(optimizer).startswith("SingleReplica")
    first = closure().item()
    for _ in range(200):
        optimizer.step(closure)
    assert closure().item() < first


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(x, y):
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


@pytest.mark.parametrize(
    ("function", "start", "minimum"), [(rosenbrock, (1.5, 1.5), (1.0, 1.0)), (beale, (1.5, 1.5), (3.0, 0.5))]
)
@every_period
def test_timm_coordinate_descent_approaches_the_minimum(create, function, start, minimum, sync_every):
    point = nn.Parameter(torch.tensor(start))
    optimizer = create([point], lr=1e-3, weight_decay=0, sync_every=sync_every)
    for step in range(2000):
        optimizer.zero_grad()
        function(*point).backward()
        point.grad[step % 2] = 0
        optimizer.step()
    distances = [(torch.tensor(values) - torch.tensor(minimum)).norm() for values in (point.tolist(), start)]
    assert distances[0] < distances[1]


@pytest.mark.parametrize(("sync_every", "steps"), [(1, 20), (25, 20), (5, 5)])
def test_timm_loss_of_a_small_model_falls_at_every_step(create, sync_every, steps):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    optimizer = create(model, lr=1e-2, sync_every=sync_every)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model(torch.linspace(0.1, 0.6, 6).reshape(3, 2)).sum())
        losses[-1].backward()
        optimizer.step()
    assert all(after < before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("settings", [{}, dict(layer_decay=0.7)], ids=["weight decay", "layer decay"])
def test_timm_factory_gives_the_groups_of_sgd(create, settings):
    model, schedule = needs("timm").create_model("test_vit", num_classes=3), needs("timm.scheduler").CosineLRScheduler
    sgd = needs("timm.optim").create_optimizer_v2(model, "sgd", lr=0.01, weight_decay=0.05, **settings)
    parle = create(model, lr=0.01, weight_decay=0.05, **settings)
    optimizers = parle, sgd
    schedulers = [schedule(optimizer, 10, warmup_t=2, t_in_epochs=False) for optimizer in optimizers]
    inputs, targets, losses = torch.linspace(-1, 1, 2 * 3 * 160**2).view(2, 3, 160, 160), torch.tensor([0, 1]), []
    for step in range(8):
        parle.zero_grad()
        losses.append(F.cross_entropy(model(inputs), targets))
        losses[-1].backward()
        parle.step()
        for scheduler in schedulers:
            scheduler.step_update(step + 1)
        names = ("params", "lr", "weight_decay")
        ours, theirs = ([[group[name] for name in names] for group in o.param_groups] for o in optimizers)
        assert is_same(ours, theirs)
    assert losses[-1] < losses[0]


TIMM_SCHEDULERS = dict(
    CosineLRScheduler=dict(t_initial=8, lr_min=1e-3, cycle_limit=2, cycle_decay=0.5),
    TanhLRScheduler=dict(t_initial=8, lr_min=1e-3, cycle_limit=2),
    PolyLRScheduler=dict(t_initial=15, power=2.0),
    StepLRScheduler=dict(decay_t=4, decay_rate=0.5),
    MultiStepLRScheduler=dict(decay_t=[6, 9, 14], decay_rate=0.3),
    PlateauLRScheduler=dict(decay_rate=0.5, patience_t=2, mode="min"),
)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("settings", [{}, dict(noise_range_t=3, noise_seed=1)], ids=["plain", "noise"])
@pytest.mark.parametrize("name", TIMM_SCHEDULERS)
@every_period
def test_timm_scheduler_gives_the_rates_of_sgd(build, name, settings, sync_every):
    schedule = getattr(needs("timm.scheduler"), name)

    def record(optimizer):
        scheduler = schedule(optimizer, **TIMM_SCHEDULERS[name], warmup_t=3, warmup_lr_init=1e-3, **settings)
        return record_schedule(
            optimizer, scheduler, range(20), lambda scheduler, index: scheduler.step(index + 1, metric=1.0)
        )

    assert record(two_groups(build, sync_every=sync_every)) == record(two_groups(sgd))


# transformers


@pytest.fixture
def train_gpt2(accelerate):
    """A function that trains a GPT-2 with tied embeddings by transformers' Trainer."""
    transformers = needs("transformers")

    def run(output_dir, optimizer_of=None, resume=None, settings=None, **arguments):
        torch.manual_seed(1)
        sizes = dict(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        if optimizer_of:
            optimizer = optimizer_of(model.parameters())
            arguments["optimizers"] = optimizer, lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
        quiet = dict(use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1)
        tokens = torch.randint(0, 16, (64, 8), generator=torch.Generator().manual_seed(1))
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(str(output_dir), max_steps=10, save_steps=5, **quiet | (settings or {})),
            train_dataset=[dict(input_ids=row, labels=row) for row in tokens],
            eval_dataset=[dict(input_ids=row, labels=row) for row in tokens[:8]],
            **arguments,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_transformers_resumes_bitwise_in_mid_round(train_gpt2, build, tmp_path):
    full = train_gpt2(tmp_path / "full", build)
    resumed = train_gpt2(tmp_path / "resumed", build, resume=str(tmp_path / "full" / "checkpoint-5"))
    assert resumed.optimizer.optimizer.rounds_done == 3
    assert is_same(resumed.model.state_dict(), full.model.state_dict())
    assert is_same(resumed.optimizer.state_dict(), full.optimizer.state_dict())
    losses = [record["loss"] for record in full.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]


def test_transformers_builds_the_optimizer_and_loads_best_model(train_gpt2, tmp_path):
    trainer = train_gpt2(
        tmp_path,
        optimizer_cls_and_kwargs=(SingleReplica, dict(lr=0.05)),
        settings=dict(
            weight_decay=0.1,
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=5,
            gradient_accumulation_steps=2,
        ),
    )
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert trainer.state.best_model_checkpoint


# ignite, skorch, PEFT


def test_ignite_schedules_and_resumes_bitwise(build):
    handlers, engine = needs("ignite.handlers"), needs("ignite.engine")

    def prepare():
        model, optimizer, _ = start(build)
        trainer = engine.create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
        schedule = handlers.PiecewiseLinear(optimizer, "lr", milestones_values=[(0, 0.0), (3, 0.1), (10, 0.01)])
        trainer.add_event_handler(engine.Events.ITERATION_STARTED, schedule)
        return dict(model=model, optimizer=optimizer, trainer=trainer, schedule=schedule)

    full, resumed = prepare(), prepare()
    full["trainer"].run(loader(), max_epochs=1)
    handlers.Checkpoint.load_objects(resumed, copy.deepcopy({name: full[name].state_dict() for name in full}))
    for parts in (full, resumed):
        parts["trainer"].run(loader(), max_epochs=3)
        assert parts["optimizer"].param_groups[0]["lr"] == 0.01
    assert is_same(full["model"].state_dict(), resumed["model"].state_dict())
    assert is_same(full["optimizer"].state_dict(), resumed["optimizer"].state_dict())


def test_skorch_saves_and_resumes_bitwise(build, tmp_path):
    inputs, targets = loader().dataset.tensors
    files = dict(f_params=tmp_path / "model", f_optimizer=tmp_path / "optimizer")
    settings = dict(module=network, criterion=nn.CrossEntropyLoss, optimizer=lambda params, lr: build(params, lr=lr))
    nets = [needs("skorch").NeuralNetClassifier(**settings, lr=0.1, train_split=None, verbose=0) for _ in range(2)]
    nets[0].fit(inputs.numpy(), targets.numpy())
    nets[0].save_params(**files)
    nets[1].initialize().load_params(**files)
    for net in nets:
        net.partial_fit(inputs.numpy(), targets.numpy())
    assert nets[0].history[-1]["train_loss"] < nets[0].history[0]["train_loss"]
    assert is_same(nets[0].module_.state_dict(), nets[1].module_.state_dict())


def test_peft_adapters_are_trained_and_saved(build, tmp_path):
    peft = needs("peft")
    model = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["0", "3"]))
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, build(model.parameters()), epochs=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora" not in name)
    model.save_pretrained(tmp_path)
    saved = needs("safetensors.torch").load_file(tmp_path / "adapter_model.safetensors")
    assert is_same(saved, dict(peft.get_peft_model_state_dict(model)))
