"""Context: seed, threads, device, ranks and events of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.threads import available

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Context:
    """The settings of the process that a run executes in; passed explicitly, there is no global."""

    seed: int = 0
    threads: int = field(default_factory=available)
    """Cores that a run computes on, and threads that tensors are distributed to."""
    device: str = "auto"
    """Where calibrated passes compute: auto, cpu, cuda or cuda:N; see compress/device.py."""
    dtype: str = "auto"
    """Compute dtype of models: float32, bfloat16, or auto: the checkpoint's own if the device multiplies in it."""
    rank: int = 0
    world_size: int = 1
    spread: bool = False
    """Whether the ranks run on several hosts, which share files and nothing else."""
    events: Callable[[dict[str, Any]], None] = lambda event: None
    """Receives progress and log events as dicts; the CLI renders them or prints them as JSON lines."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone locks, makes directories, publishes and sends events."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def broadcast(self, value: Any, rank: int = 0) -> Any:
        """The value of one rank, on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=rank)
        return box[0]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replaces a tensor by its sum over all ranks."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def tell(self, kind: str, **facts: Any) -> None:
        """Sends an event, from rank 0 only."""
        if self.is_main:
            self.events({"event": kind, **facts})
