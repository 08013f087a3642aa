"""What one rank holds at one moment, by kind."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Memory:
    """One rank at one moment, in bytes.

    Attributes:
        optimizer: moments, and under ZeRO the fp32 copy of the own shard. buffers: by name.
        host: in CPU memory, by name: what `offload_optimizer` moves there, and whole copies of the model.
    """

    moment: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    buffers: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Where the rank computes."""
        return self.weights + self.gradients + self.optimizer + self.activations + sum(self.buffers.values())

    def kinds(self) -> dict[str, int]:
        """The columns of the plan's table."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "buffers": sum(self.buffers.values()),
        }

    def at(self, moment: Memory) -> Memory:
        """What is always there, and what `moment` adds."""
        return Memory(
            moment.moment,
            weights=self.weights + moment.weights,
            gradients=self.gradients + moment.gradients,
            optimizer=self.optimizer,
            activations=moment.activations,
            buffers={name: size for name, size in (self.buffers | moment.buffers).items() if size},
            host=self.host,
        )
