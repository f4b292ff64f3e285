"""Simulates several devices on a CPU: the storage of each tensor is labeled with its simulated device."""

from torch import Tensor
from torch.ops import aten
from torch.utils._python_dispatch import TorchDispatchMode


def device_of(tensor):
    """Return the simulated device of a tensor; None until it is used with a tensor that has one."""
    return getattr(tensor.untyped_storage(), "simulated_device", None)


def tensors_in(values):
    """Yield the tensors among these values and in lists of them: operations do not nest deeper."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


class SimulatedDevices(TorchDispatchMode):
    """A mode in which `.to("cpu:1")` puts a tensor, and everything computed from it, on that device.

    As with GPUs, only copies cross devices: any other operation on tensors of two devices is an error. A new tensor
    belongs to the device that first uses it, except scalars (0-dim), which every device reads from the host.
    `copies` lists the copies between devices, each as (from, to, number of elements).
    """

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        inputs = list(tensors_in((*arguments, *settings.values())))
        devices = {device_of(tensor) for tensor in inputs} - {None}
        wanted = settings.get("device")
        if wanted is not None and wanted.index is not None:
            devices.add(wanted)
        source = device_of(inputs[-1]) if inputs else None
        if len(devices) > 1:
            if function not in (aten.copy_.default, aten._to_copy.default):
                raise RuntimeError(f"{function} has tensors on {' and '.join(sorted(map(str, devices)))}")
            devices.remove(source)
            self.copies += [(source, target, inputs[-1].numel()) for target in devices]
        result = function(*arguments, **settings)
        fresh = [tensor for tensor in inputs if tensor.dim() and function is not aten._to_copy.default]
        for tensor in (*tensors_in([result]), *fresh):
            if device_of(tensor) is None:
                tensor.untyped_storage().simulated_device = next(iter(devices), None)
        return result
