"""One model on many processes: the device meshes, what is sharded over them, and the sums across them.

`parallelize` does, in this order, tensor and context parallelism (parts of sequences), expert parallelism, FSDP2. All
losses are already divided by counts over the whole batch, so gradients are summed over ranks, never averaged.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from glm45.model.moe import Experts, MoE
from glm45.model.transformer import Glm45
from glm45.training.dtensors import local
from glm45.training.expert_parallel import divide_experts
from glm45.training.layout import Layout
from glm45.training.pipeline import Pipeline, sum_embedding_gradients
from glm45.training.sequence_parallel import balance_parts, divide_widths, take_tokens, trade_heads

DENSE = ("pipeline", "replicate", "fsdp", "tensor")
"""Mesh of everything but divided experts; `fsdp` is shard x context, the ranks that share weights."""

SPARSE = ("pipeline", "replicate", "expert_fsdp", "expert")
"""Mesh of divided experts: the same ranks, `fsdp` and `tensor` together split into those that share an expert and
those that divide them."""

SEQUENCE = ("data", "context", "tensor")
"""Mesh of parts of sequences."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    layout: Layout
    device: torch.device
    rank: int = 0
    dense: DeviceMesh | None = None
    """The meshes are None for a single process."""
    sparse: DeviceMesh | None = None
    sequence: DeviceMesh | None = None
    ends: dist.ProcessGroup | None = None
    """The ranks of the first and the last layers, which both hold the embedding, if this is one of them."""

    @classmethod
    def start(cls, layout: Layout) -> "World":
        """Join the processes that torchrun started, or be alone. Raises ValueError if the layout needs other ranks."""
        world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        layout = layout.resolve(world_size)
        if world_size == 1:
            return cls(layout, device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        outer, fsdp = (layout.pipeline, layout.replicate), layout.shard * layout.context
        sequence_shape = (layout.pipeline * layout.replicate * layout.shard, layout.context, layout.tensor)
        dense = init_device_mesh(device.type, (*outer, fsdp, layout.tensor), mesh_dim_names=DENSE)
        sequence = init_device_mesh(device.type, sequence_shape, mesh_dim_names=SEQUENCE)
        sparse = None
        if layout.expert > 1:
            sizes = (*outer, fsdp * layout.tensor // layout.expert, layout.expert)
            sparse = init_device_mesh(device.type, sizes, mesh_dim_names=SPARSE)
        return cls(layout, device, rank, dense, sparse, sequence, _ends(layout, world_size))

    @property
    def num_data_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.layout.replicate * self.layout.shard

    @property
    def data_rank(self) -> int:
        """Which part of every batch's rows this rank reads."""
        return self.rank // (self.layout.context * self.layout.tensor) % self.num_data_ranks

    @property
    def pipeline_rank(self) -> int:
        """Which part of the layers this rank has."""
        return self.rank // (self.layout.ranks_per_copy // self.layout.pipeline * self.layout.replicate)

    @property
    def counts_rows(self) -> bool:
        """Whether this rank speaks for its rows where several ranks read the same ones."""
        return self.rank % (self.layout.context * self.layout.tensor) == 0 and self.pipeline_rank == 0

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same unsharded weights as this one, if there are others."""
        if self.dense is None or uses_fsdp(self.layout) or self.layout.replicate == 1:
            return None
        return self.dense["replicate"].get_group()

    def part(self, x_BT: torch.Tensor, tensor: bool = True) -> torch.Tensor:
        """Return this rank's part of the tokens (dimension 1), or that of its context if `tensor` is false."""
        layout = self.layout
        if layout.context * layout.tensor == 1:
            return x_BT
        x_BT = x_BT.chunk(layout.context, dim=1)[self.rank // layout.tensor % layout.context]
        return x_BT.chunk(layout.tensor, dim=1)[self.rank % layout.tensor] if tensor else x_BT

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks, the same on every rank."""
        if self.dense is not None:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: float) -> float:
        """Return the largest of the numbers that all ranks give."""
        if self.dense is None:
            return number
        tensor = torch.tensor(float(number))
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def first(self, value: str) -> str:
        """Return the value that rank 0 gives."""
        values = [value]
        if self.dense is not None:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def close(self) -> None:
        """Leave the group of processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _ends(layout: Layout, world_size: int) -> dist.ProcessGroup | None:
    """Make the groups of ranks that share an embedding across the pipeline; return this rank's."""
    if layout.pipeline == 1:
        return None
    wide = world_size // layout.pipeline
    group, _ = dist.new_subgroups_by_enumeration([[rank, world_size - wide + rank] for rank in range(wide)])
    return group if group is not dist.GroupMember.NON_GROUP_MEMBER else None


def parallelize(model: Glm45, world: World) -> Pipeline | None:
    """Spread a model over the ranks in place; every rank must hold the same weights before.

    Returns the pipeline that runs it, or None where the model runs by itself.
    """
    layout = world.layout
    if world.dense is None:
        return None
    _divide_sequences(model, world)
    if world.sparse is not None:
        for block in model.moe_layers():
            divide_experts(block.experts, world.sparse["expert"])
    pipeline = None
    if layout.pipeline > 1:
        pipeline = Pipeline(model, layout, world.dense["pipeline"], world.device)
    if uses_fsdp(layout):
        _shard(model, list(pipeline.parts) if pipeline else [model], world)
    return pipeline


def _divide_sequences(model: Glm45, world: World) -> None:
    """Let every rank have a part of each row: context parallelism divides it first, tensor parallelism again."""
    layout = world.layout
    if layout.context * layout.tensor == 1:
        return
    assert world.dense is not None
    assert world.sequence is not None
    contexts = world.sequence["context"].get_group()

    def context_part(x_BT: torch.Tensor) -> torch.Tensor:
        return world.part(x_BT, tensor=False)

    if layout.context > 1:
        trade_heads(model, contexts, context_part)
    if layout.expert > 1:  # divided experts take the tokens as they lie
        balance_parts(model, dist.new_subgroups(layout.context * layout.tensor)[0], world.part)
    elif layout.context > 1:
        balance_parts(model, contexts, context_part)
    if layout.tensor > 1:
        divide_widths(model, world.dense["tensor"], moe=layout.expert == 1)
    take_tokens(model, world.part)


def uses_fsdp(layout: Layout) -> bool:
    """Whether weights are sharded, or there are copies of something that is."""
    return layout.shard * layout.context > 1 or layout.replicate * layout.tensor > layout.replicate


def _shard(model: Glm45, roots: Sequence[nn.Module], world: World) -> None:
    """Wrap every decoder layer, its divided experts apart, and in each root the rest in FSDP2."""
    assert world.dense is not None
    # It is a view, of which FSDP warns; nothing is done to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    names = ("replicate", "fsdp") if world.layout.replicate > 1 else ("fsdp",)
    mesh, placement = world.dense[names], _shard_placement(model.config.hidden_size)
    for layer in model.decoder_layers():
        if world.sparse is not None and isinstance(layer.mlp, MoE):
            sparse_names = tuple("expert_fsdp" if name == "fsdp" else name for name in names)
            _shard_experts(layer.mlp.experts, world.sparse[sparse_names], layer.compute_dtype)
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    if model.mtp is not None:
        fully_shard(model.mtp, mesh=mesh, shard_placement_fn=placement)
    for root in roots:
        fully_shard(root, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=False)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def _shard_experts(experts: Experts, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard whole experts where there are enough, so that Muon works on them without communication."""
    ranks = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        if local(parameter).shape[0] % ranks == 0:
            return Shard(0)
        return Shard(3 if parameter.ndim == 4 else 1)  # the hidden dimension

    # Their products are in the compute dtype anyway: gathered in it, they are half the traffic.
    reduce_dtype = torch.float32 if compute_dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    fully_shard(experts, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)


def _shard_placement(hidden_size: int) -> Callable[[nn.Parameter], Shard]:
    """Return FSDP's rule: along the hidden dimension, which every matrix has and no other parallelism divides."""

    def placement(parameter: nn.Parameter) -> Shard:
        whole_dims = [dim for dim, size in enumerate(parameter.shape) if size == hidden_size]
        if parameter.ndim == 1 or not whole_dims:
            return Shard(0)
        own = [getattr(place, "dim", None) for place in getattr(parameter, "placements", ())]
        return Shard(next(dim for dim in reversed(whole_dims) if dim not in own))

    return placement


def reduce_gradients(model: Glm45, world: World) -> None:
    """Sum the gradients that FSDP does not: of replicas without it, and of what tensor parallelism does not divide."""
    if world.dense is None:
        return
    if world.replicas is not None:
        _all_reduce([parameter.grad for parameter in model.parameters()], world.dense["replicate"])
    if world.layout.tensor > 1:
        whole = [parameter.grad for parameter in model.parameters() if not is_divided(parameter)]
        _all_reduce(whole, world.dense["tensor"])
    if world.ends is not None:
        sum_embedding_gradients(model, world.ends)


def is_copy(name: str, world: World) -> bool:
    """Whether a parameter is held a second time: the embedding at the end of a pipeline."""
    return world.pipeline_rank > 0 and name.startswith("embed_tokens")


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether the ranks of a tensor-parallel group hold different parts of a parameter."""
    names = (parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else ()
    return "tensor" in names or "expert" in names


def _all_reduce(gradients: "list[torch.Tensor | None]", mesh: DeviceMesh) -> None:
    """Sum gradients over a mesh dimension, all in one message."""
    parts = [local(gradient) for gradient in gradients if gradient is not None]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=mesh.get_group())
    pieces = flat.split([part.numel() for part in parts])
    torch._foreach_copy_(parts, [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)])
