"""The networks: sizes, layers, initialization and recipes."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loader
import models

NAMES = list(models.RECIPES)
SHAPES = [(1, 28, 10), (3, 32, 100), (1, 8, 10)]  # mnist and fashion; cifar100; digits
ON_CPU = [name for name in NAMES if name != "wrn-28-10"]


def images(count, channels, size):
    return torch.randn(count, channels, size, size).to(memory_format=torch.channels_last)


def layers(model, *kinds):
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def randomize_batch_norm(model):
    """Give batch norm random weights of both signs and random statistics."""
    for layer in layers(model, nn.BatchNorm1d, nn.BatchNorm2d):
        for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
            tensor.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize(
    ("name", "channels", "size", "parameters"),
    [
        ("lenet", 1, 28, 132_220),
        ("allcnn", 3, 32, 1_667_166),
        ("wrn-28-10", 3, 32, 36_479_194),
        ("wrn-16-4", 3, 32, 2_748_890),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, channels, size, parameters):
    with torch.device("meta"):
        model = models.build(name, channels, size, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("channels", "size", "classes"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_fits_every_data_set(name, channels, size, classes):
    with torch.device("cpu" if name in ON_CPU else "meta"):
        model = models.build(name, channels, size, classes).eval()
        logits = model(images(2, channels, size))
    assert logits.shape == (2, classes)
    if name in ON_CPU:
        assert logits.isfinite().all() and not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(("channels", "size", "training"), [(1, 28, True), (3, 32, False)])
def test_lenet_equals_its_form_with_relu_before_pooling(channels, size, training):
    model = randomize_batch_norm(models.build("lenet", channels, size, 10, dropout=0.0)).train(training)
    plain = deepcopy(model)
    inputs = images(8, channels, size)

    hidden = inputs
    convolutions, norms = layers(plain, nn.Conv2d), layers(plain, nn.BatchNorm2d)
    for convolution, norm, window in zip(convolutions, norms, (3, 2), strict=True):
        hidden = F.max_pool2d(F.relu(norm(convolution(hidden))), window)
    (inner, outer), (norm,) = layers(plain, nn.Linear), layers(plain, nn.BatchNorm1d)
    logits = outer(F.relu(norm(inner(hidden.flatten(1)))))
    torch.testing.assert_close(model(inputs), logits, atol=1e-5, rtol=1e-5)


def test_small_images_are_upsampled_for_lenet():
    small, large = models.build("lenet", 1, 8, 10).eval(), models.build("lenet", 1, 28, 10).eval()
    large.load_state_dict(small.state_dict())
    inputs = images(2, 1, 8)
    upsampled = F.interpolate(inputs, size=28, mode="bilinear")
    torch.testing.assert_close(small(inputs), large(upsampled))


@pytest.mark.parametrize(
    ("name", "dropout", "probabilities"),
    [
        ("lenet", None, [0.25] * 3),
        ("lenet", 0.4, [0.4] * 3),
        ("allcnn", None, [0.2, 0.5, 0.5]),
        ("allcnn", 0.3, [0.2, 0.3, 0.3]),
        ("wrn-16-4", None, [0.4] * 6),
        ("wrn-16-4", 0.1, [0.1] * 6),
        ("wrn-28-10", None, [0.25] * 12),
        ("lenet", 0.0, [0.0] * 3),
        ("allcnn", 0.0, [0.0] * 3),
        ("wrn-16-4", 0.0, [0.0] * 6),
    ],
)
def test_dropout_probabilities_are_as_given(name, dropout, probabilities):
    with torch.device("meta"):
        model = models.build(name, 3, 32, 10, dropout)
    assert [layer.p for layer in layers(model, nn.Dropout)] == probabilities


@pytest.mark.parametrize("name", ON_CPU)
def test_dropout_zero_makes_training_repeatable(name):
    inputs = images(2, 1, 8)
    for dropout, repeats in ((0.0, True), (0.5, False)):
        model = models.build(name, 1, 8, 10, dropout).train()
        assert torch.equal(model(inputs), model(inputs)) == repeats


@pytest.mark.parametrize("name", ON_CPU)
def test_weights_and_activations_are_channels_last(name):
    model = models.build(name, 3, 32, 10).eval()
    kernels = [layer.weight for layer in layers(model, nn.Conv2d)]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert not any(kernel.is_contiguous() for kernel in kernels if kernel.shape[-1] > 1)
    outputs = []
    layers(model, nn.BatchNorm2d)[1].register_forward_hook(lambda layer, given, output: outputs.append(output))
    model(images(2, 3, 32))
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)


def test_wide_resnets_are_initialized_as_in_their_paper():
    model = models.build("wrn-16-4", 3, 32, 10)
    for layer in layers(model, nn.Conv2d):
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        error = 4 / layer.weight.numel() ** 0.5  # four standard errors of a measured standard deviation
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=error)
        assert abs(layer.weight.mean()) < error * (2 / fan_out) ** 0.5 * 1.5
        assert layer.bias is None
    for layer in layers(model, nn.BatchNorm2d):
        assert (layer.weight == 1).all() and (layer.bias == 0).all()
    (linear,) = layers(model, nn.Linear)
    assert (linear.bias == 0).all() and (linear.weight != 0).any()


def test_wide_resnets_have_the_widths_and_strides_of_the_paper():
    model = models.build("wrn-16-4", 3, 32, 10).eval()
    shapes = []
    for block in layers(model, models.WideBlock):
        block.register_forward_hook(lambda layer, given, output: shapes.append(tuple(output.shape[1:])))
    model(images(2, 3, 32))
    assert shapes == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2


def test_block_of_equal_width_adds_to_its_input():
    block = models.WideBlock(8, 8, 1, dropout=0.0).eval()
    nn.init.zeros_(block.conv2.weight)
    inputs = images(2, 8, 6)
    assert torch.equal(block(inputs), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_complete_and_name_known_data_sets(name):
    recipe = models.RECIPES[name]
    assert recipe["dataset"] in loader.DATASETS
    assert recipe.keys() == {"dataset", "epochs", "lr_drops", "weight_decay", "dropout"}
    assert min(recipe["lr_drops"]) > 0 and max(recipe["lr_drops"]) < recipe["epochs"]
    assert sorted(set(recipe["lr_drops"])) == recipe["lr_drops"]


@pytest.mark.parametrize("name", ["lenet", "wrn-16-4"])
def test_saved_state_dict_restores_the_same_function(name, tmp_path):
    model = randomize_batch_norm(models.build(name, 1, 8, 10)).eval()
    torch.save(model.state_dict(), tmp_path / "master.pt")
    restored = models.build(name, 1, 8, 10).eval()
    inputs = images(2, 1, 8)
    assert not torch.equal(restored(inputs), model(inputs))
    restored.load_state_dict(torch.load(tmp_path / "master.pt", weights_only=True))
    assert torch.equal(restored(inputs), model(inputs))
