"""A device that computes on the CPU but is not it, and writes down each time that the host waits for it.

On a GPU every number that the host reads, every shape that depends on numbers, and every tensor that is made from a
Python list and sent over stops the host until the device has caught up. None of this is seen on a CPU. Tensors of this
device say that they are on `meta`, so that reading them goes through a copy, which is noticed.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
# Operators whose result has a shape, or is a number, that only the device knows.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "bincount", "is_nonzero"}
READS |= {"equal", "unique_dim", "unique_dim_consecutive"}


class Afar(Tensor):
    """A tensor of the device, around the real one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Afar:
        made = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Afar({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("A tensor of the pretended device is used outside of it.")


class Pretence(TorchDispatchMode):
    """While it is on, `Afar` tensors compute. `waits` counts by place why the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()

    def wait(self, why: str) -> None:
        self.waits[why, _place()] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        tensors: list[Tensor] = []
        tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        afar = any(isinstance(x, Afar) for x in tensors)
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        goes = afar if wanted is None else torch.device(wanted) == DEVICE
        if afar and wanted is not None and not goes:
            self.wait(f"{name} to the host")
        if not afar and goes and tensors and not kwargs.get("non_blocking"):
            self.wait(f"{name} from the host")
        if afar and name in READS:
            self.wait(name)
        if afar and name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            for one in args[1]:
                if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} by a mask")
                elif isinstance(one, Tensor) and not isinstance(one, Afar):
                    self.wait(f"{name} by a tensor of the host")
        if afar and name == "repeat_interleave" and "output_size" not in kwargs:
            self.wait(name)
        if name == "_fused_sdp_choice":
            return 0
        first = args[0] if args else None
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Afar) else x, (args, kwargs))
        if name in ("_to_copy", "copy_") and "non_blocking" in kwargs:
            kwargs["non_blocking"] = False
        result = function(*args, **kwargs)
        if name.endswith("_") and isinstance(first, Tensor):
            return first
        return tree_map(lambda x: Afar(x) if isinstance(x, Tensor) else x, result) if goes else result


class _Made(TorchFunctionMode):
    """Tensors made of Python numbers on the device are sent there."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self._pretence = pretence

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if (
            function in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
            and device is not None
            and torch.device(device) == DEVICE
        ):
            if not (isinstance(args[0], Afar)):
                del kwargs["device"]
                return function(*args, **kwargs).to(DEVICE)
        if function in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], Afar):
            self._pretence.wait(function.__name__)
            return function(args[0].inner, *args[1:], **kwargs)
        if function is Tensor.new_tensor and isinstance(args[0], Afar):
            return torch.tensor(*args[1:], dtype=args[0].dtype, **kwargs).to(DEVICE)
        return function(*args, **kwargs)


def _place() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "pretend.py" not in f.filename]
    return " < ".join(f"{'/'.join(f.filename.split('/')[-4:])}:{f.lineno} {f.name}" for f in reversed(frames[-6:]))


def move(module: nn.Module) -> None:
    """Move a module's parameters and buffers there."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and not isinstance(tensor, Afar):
                    made: Tensor = Afar(tensor.detach())
                    table[name] = nn.Parameter(made, tensor.requires_grad) if table is part._parameters else made


@contextmanager
def pretend() -> Iterator[Pretence]:
    made = torch.Generator
    torch.Generator = lambda *_: made()  # type: ignore[misc]
    with Pretence() as pretence, _Made(pretence):
        yield pretence
