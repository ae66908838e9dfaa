"""A device that computes on the CPU but is not it, and counts each time that the host waits for it.

On a GPU every number that the host reads, every shape that depends on numbers, and every tensor that the host makes and
sends over without `non_blocking` stops it until the device has caught up. On a CPU none of this is seen. Tensors of
this device say that they are on `meta`, so whatever looks into them must ask here.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
# Operators whose result is a number, or of a shape, that only the device knows.
READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",  # without output_size
    "unique_consecutive",
    "unique_dim",
}
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Afar(Tensor):
    """A tensor of the device, around one of the CPU. Only under `pretend` does it compute."""

    near: Tensor

    def __new__(cls, near: Tensor) -> Self:
        like = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made = Tensor._make_wrapper_subclass(cls, near.shape, device=DEVICE, **like)
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("A tensor of the pretended device is used outside of it.")


class Waits(TorchDispatchMode):
    """Runs the device and counts waits by (what, where), where from the innermost frame outwards."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def add(self, what: str) -> None:
        frames = [
            one for one in traceback.extract_stack() if "/torch/" not in one.filename and one.filename != __file__
        ]
        self.found[what, " < ".join(f"{one.filename}:{one.lineno} {one.name}" for one in frames[:-7:-1])] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, to = function.overloadpacket.__name__, kwargs.get("device")
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        afar = any(isinstance(one, Afar) for one in tensors)
        stays = afar if to is None else torch.device(to) == DEVICE
        if tensors and afar != stays and not (stays and kwargs.get("non_blocking")):
            self.add("sent from the host" if stays else "sent to the host")
        if afar and name in READS and "output_size" not in kwargs:
            self.add(name)
        if afar and name in INDEXED and any(_is_read(one) for one in args[1] if one is not None):
            self.add("an index that is a mask, or the host's")
        if name == "_fused_sdp_choice":
            return 0  # in plain operators
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        near_args, near_kwargs = tree_map_only(Afar, lambda one: one.near, (args, kwargs))
        result = function(*near_args, **near_kwargs)
        if name.endswith("_"):  # in place
            return args[0]
        return tree_map_only(Tensor, Afar, result) if stays else result


def _is_read(index: Tensor) -> bool:
    return not isinstance(index, Afar) or index.dtype in (torch.bool, torch.uint8)


class _Python(TorchFunctionMode):
    """What goes between tensors and Python's own numbers without an operator."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        afar = isinstance(args[0], Afar) if args else False
        if function in (Tensor.tolist, Tensor.numpy) and afar:
            self._waits.add(function.__name__)
            return function(args[0].near, **kwargs)
        if function is Tensor.new_tensor and afar:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if function in (torch.tensor, torch.as_tensor) and not afar and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def move(module: nn.Module) -> None:
    """Move a module's parameters and buffers to the device; call it under `pretend`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(Afar(weight.detach()), weight.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else Afar(buffer)


@contextmanager
def pretend() -> Iterator[Waits]:
    """Within this, tensors on `meta` that are `Afar` compute, and waits are counted."""
    generator = torch.Generator
    with mock.patch("torch.Generator", side_effect=lambda *_: generator()), Waits() as waits, _Python(waits):
        yield waits
