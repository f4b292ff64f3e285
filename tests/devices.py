"""Several devices where there is only a CPU: each tensor's memory is labelled with the one where it pretends to be."""

from torch import Tensor
from torch.ops import aten
from torch.utils._python_dispatch import TorchDispatchMode


def device_of(tensor):
    """None as long as it has not met a tensor that has one."""
    return getattr(tensor.untyped_storage(), "pretended_device", None)


def tensors_in(values):
    """And in their lists: what an operation takes or gives is never nested deeper."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


class Devices(TorchDispatchMode):
    """Within it, `.to("cpu:1")` puts a tensor on that device; what is computed from it is there too.

    As between GPUs, only copying crosses from one to another: whatever else has tensors of two is an error. A fresh
    tensor is where it is first used, but for scalars (0-dim), which any device reads from the host. Crossings are
    listed in `copies`, each as (from, to, number of elements).
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
                tensor.untyped_storage().pretended_device = next(iter(devices), None)
        return result
