"""Several processes as one run: what they must agree on, and a target that is spread over their devices.

Gradients are averaged by torch's DDP, which accelerate puts around the student. What the processes tell each other
about the run goes over the hosts, so that no device is waited for, and with patience: one may be measuring for long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from speculens.errors import UserError
from speculens.targets import Target

PATIENCE = timedelta(days=1)  # a process that dies is noticed at once, by its closed connection
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(*, on_cpu: bool) -> Accelerator:
    """Accelerate's view of how this process was launched. Number formats are the recipe's business alone."""
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
    if accelerator.distributed_type not in PLAIN:
        raise UserError(
            f"The launcher asks for {accelerator.distributed_type.value}, but drafters train by data parallelism: use "
            "torchrun or accelerate's --multi_gpu; to spread a large target say shard_target: true in the recipe."
        )
    return accelerator


def disband() -> None:
    """Leave the group of processes, after the last run of this one; without a group, nothing.

    A process that ends with gloo's threads still running is aborted now and then, its work done.
    """
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


class Crew:
    """The processes of a run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.size, self.rank = accelerator.num_processes, accelerator.process_index
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        summed = torch.tensor(numbers, dtype=torch.float64)
        if self._group is not None:
            distributed.all_reduce(summed, group=self._group)
        return summed.tolist()

    def first(self, word: str | None) -> str | None:
        """The first word that any process has."""
        words = [word] * self.size
        if self._group is not None:
            distributed.all_gather_object(words, word, group=self._group)
        return next((word for word in words if word is not None), None)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before all others do."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()

    def wait(self) -> None:
        """For all to come here."""
        self.total()


def shard(target: Target, accelerator: Accelerator) -> None:
    """Spread each layer of a frozen target's decoder over the processes; it is gathered while it runs (FSDP2).

    The rest (vision tower, embedding, head) stays whole on each device. Every process must then call the target equally
    often. Changes `target` in place. Raises UserError in a run of one process.
    """
    if accelerator.num_processes == 1:
        raise UserError("shard_target needs several processes: launch with torchrun or accelerate, or set it to false.")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in target.decoder.layers:
        if not isinstance(layer, FSDPModule):
            # Each layer is a root of its own, and a root would keep its gathered weights after its forward.
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    target.model.to(accelerator.device)
