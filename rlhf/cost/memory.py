"""Bytes that a process holds at its peak, role by role: what FSDP2 shards over processes, and what stays whole on each of them.

Of n processes each holds, in bytes:

    FSDP2:  (weights + gradients + moments) / n + what is whole for now + activations
    DDP:     weights + gradients + moments      + gradients once more   + activations

Activations, logits among them, are those of a process's own rows, so they don't divide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from rlhf.cost.slices import Slices

Sharding: TypeAlias = Literal["ddp", "fsdp2"]
BITS = 4.5  # of a 4-bit weight, with its scales
MOMENTS = 2  # that AdamW keeps of each weight, each as large
# FSDP2 gathers a layer while the one before it is at work. Of the gradients, one layer's are added up while another's are sent.
LAYERS_WHOLE = 2


@dataclass(frozen=True)
class Processes:
    """How a run is launched.

    Attributes:
        count: of processes, each with a device of its own.
        sharding: "ddp", where each holds all of a model, or "fsdp2", where each holds its part.
    """

    count: int = 1
    sharding: Sharding = "ddp"

    @property
    def parts(self) -> int:
        """Return over how many processes a weight is divided."""
        return self.count if self.sharding == "fsdp2" else 1


@dataclass(frozen=True)
class Role:
    """What a model is in a stage, and the bytes of its weights over all processes.

    Attributes:
        name: "policy", "critic", "reference", "reward"; "model" where a stage has only one.
        weights: all of them, those of an adapter included.
        trained: of these, what has gradients, as large, and AdamW's moments, twice as large.
        quantised: of these, 4-bit weights, which FSDP2 leaves whole on every process.
        layer, layer_trained: bytes of one layer that FSDP2 shards, and of these the trained ones.
        rest, rest_trained: of what is no layer: embeddings, last norm, head.
    """

    name: str
    weights: float
    trained: float = 0.0
    quantised: float = 0.0
    layer: float = 0.0
    layer_trained: float = 0.0
    rest: float = 0.0
    rest_trained: float = 0.0

    def share(self, processes: Processes) -> "Share":
        """Return what one process holds of it between its forwards."""
        parts = processes.parts
        return Share(
            self.name,
            weights=self.quantised + (self.weights - self.quantised) / parts,
            gradients=self.trained / parts,
            moments=MOMENTS * self.trained / parts,
        )


def role_of(name: str, slices: Slices, *, trained: bool = True, quantised: bool = False) -> Role:
    """Return a role that is a model of its own.

    Args:
        trained: whether what can be trained in the slices is.
        quantised: whether the frozen weights of its layers are held in 4 bits.
    """
    layer, trainable = slices.layer(), slices.layer(trainable=True)
    rest = slices.weights() - slices.layers * layer
    in_4_bits = slices.layers * (layer - trainable) * BITS / 16 if quantised else 0.0
    sharded = trainable if quantised else layer
    role = Role(name, rest + slices.layers * sharded + in_4_bits, quantised=in_4_bits, layer=sharded, rest=rest)
    if not trained:
        return role
    all_trainable = slices.weights(trainable=True)
    return replace(
        role, trained=all_trainable, layer_trained=trainable, rest_trained=all_trainable - slices.layers * trainable
    )


def adapter_of(name: str, slices: Slices, *, trained: bool = True) -> Role:
    """Return a role that is an adapter on the policy's base."""
    weights, layer = slices.weights(trainable=True), slices.layer(trainable=True)
    return Role(name, weights, weights if trained else 0.0, layer=layer, layer_trained=layer if trained else 0.0)


@dataclass(frozen=True)
class Share:
    """Bytes of a role that one process holds; its gradients are those of an optimizer step's end."""

    name: str
    weights: float
    gradients: float
    moments: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a stage.

    Attributes:
        process: before any model is loaded.
        shares: of the roles.
        exchanged: what processes exchange, beside the shares: weights that FSDP2 holds whole for now, with gradients of theirs
            that are not yet sent; the copy of the gradients that DDP sends.
        activations: what lives between and in operations, logits among it.
        accumulates: whether gradients of an earlier micro-batch are there beside the activations. If not, they come while
            activations go, and the larger of both is there at once.
    """

    process: float
    shares: tuple[Share, ...]
    exchanged: float = 0.0
    activations: float = 0.0
    accumulates: bool = True

    @property
    def bytes(self) -> float:
        """Return all of it."""
        gradients = sum(share.gradients for share in self.shares)
        changing = gradients + self.activations if self.accumulates else max(gradients, self.activations)
        return self.process + sum(share.weights + share.moments for share in self.shares) + self.exchanged + changing


def largest(memories: Sequence[Memory]) -> Memory:
    """Return the largest of the moments of a stage."""
    return max(memories, key=lambda memory: memory.bytes)


def exchanged_in_training(roles: tuple[Role, ...], processes: Processes) -> float:
    """Return the bytes that processes exchange, at most, while the roles are trained.

    Of FSDP2: two layers of the largest role, and what is no layer of every trained role, which is whole from forward to
    backward; the same of gradients, where they are trained. Of DDP: its buckets, into which gradients are copied to be sent.

    >>> role = Role("model", weights=100.0, trained=100.0, layer=10.0, layer_trained=10.0, rest=20.0, rest_trained=20.0)
    >>> [exchanged_in_training((role,), Processes(n, way)) for n, way in ((1, "fsdp2"), (4, "fsdp2"), (4, "ddp"))]
    [0.0, 80.0, 100.0]
    """
    if processes.count == 1:
        return 0.0
    trained = [role for role in roles if role.trained]
    if processes.parts == 1:
        return sum(role.trained for role in trained)
    layers = max((role.layer + role.layer_trained for role in trained), default=0.0)
    return LAYERS_WHOLE * layers + sum(role.rest + role.rest_trained for role in trained)


def exchanged_in_rollouts(roles: tuple[Role, ...], processes: Processes) -> float:
    """Return the bytes that FSDP2 holds whole while answers are sampled and scored: all weights of all roles that it shards.

    No process waits for another there, so each needs all of them.

    >>> exchanged_in_rollouts((Role("policy", 100.0, quantised=60.0), Role("reward", 5.0)), Processes(4, "fsdp2"))
    45.0
    """
    return sum(role.weights - role.quantised for role in roles) if processes.parts > 1 else 0.0
