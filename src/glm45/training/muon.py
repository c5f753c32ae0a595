"""Muon: momentum whose update is orthogonalised, matrix by matrix (report section 2.4).

S matrices of one shape, M and N their rows and columns.

A parameter may hold many matrices: an expert stack, gate and up fused, the grouped rows of queries, keys and values.
`split_matrices` says which; each is orthogonalised by itself, since the nearest orthogonal matrix of a fused one is
another matrix (about half of the update would differ). Matrices of one shape are batched over the whole model.

Sharded parameters (DTensors) are updated with whole matrices: a shard that holds whole experts works by itself;
everything else is brought together by one all-to-all a shape, each rank then owning some of the matrices, and taken
back by another.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from glm45.kernels.orthogonalize import orthogonalize
from glm45.training.dtensors import local

BATCH_ELEMENTS = 1 << 24
"""Elements orthogonalised at once: bounds the memory of the iteration on large models."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, decoupled weight decay and updates of a fixed root-mean-square.

    `lr` is in AdamW's units: the update of every matrix is scaled by `update_rms * sqrt(max(M, N))`, which gives an
    orthogonal matrix of full rank the root-mean-square `update_rms` (`match_rms_adamw` in `torch.optim.Muon`, of
    which this is the batched form). A parameter group may carry `layout`, "stack" or "qkv": see `split_matrices`.
    `replicas` are ranks that hold the same parameters and gradients, unsharded: they divide the work.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        ns_steps: int = 5,
        update_rms: float = 0.2,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "update_rms": update_rms,
            "layout": "stack",
        }
        super().__init__(params, defaults)
        self.replicas = replicas
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon is for matrices; a parameter of shape {tuple(parameter.shape)} is none")
                # Made now, so that a checkpoint can be loaded in place before the first step.
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            active = [parameter for parameter in group["params"] if parameter.grad is not None]
            if active:
                self._step_group(group, active)

    def _step_group(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        momenta = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        torch._foreach_mul_([local(parameter) for parameter in parameters], 1 - group["lr"] * group["weight_decay"])
        buckets: dict[Any, list[Matrices]] = defaultdict(list)
        for parameter, update in zip(parameters, updates, strict=True):
            for matrices in split_matrices(parameter, update, group["layout"]):
                buckets[matrices.bucket].append(matrices)
        chunks = [chunk for bucket in buckets.values() for chunk in _chunks(bucket)]
        if self.replicas is None:
            for chunk in chunks:
                _apply(group, chunk, _orthogonalize_stack(_stack(chunk), chunk[0], group["ns_steps"]))
        else:
            divided = _orthogonalize_divided([_stack(chunk) for chunk in chunks], group["ns_steps"], self.replicas)
            for chunk, orthogonal_SMN in zip(chunks, divided, strict=True):
                _apply(group, chunk, orthogonal_SMN)


def _stack(chunk: "list[Matrices]") -> torch.Tensor:
    return torch.cat([matrices.update_SMN for matrices in chunk])


def _apply(group: dict[str, Any], chunk: "list[Matrices]", orthogonal_SMN: torch.Tensor) -> None:
    """Add orthogonalised updates to the parameters that they belong to."""
    scale = -group["lr"] * group["update_rms"] * max(chunk[0].shape) ** 0.5
    sizes = [matrices.update_SMN.shape[0] for matrices in chunk]
    for matrices, update_SMN in zip(chunk, orthogonal_SMN.split(sizes), strict=True):
        view = matrices.parameter_view
        update_SMN = update_SMN.mT if matrices.transposed else update_SMN
        view.add_(update_SMN.reshape(view.shape).to(view.dtype), alpha=scale)


def _orthogonalize_divided(
    stacks: "list[torch.Tensor]", steps: int, replicas: dist.ProcessGroup
) -> "list[torch.Tensor]":
    """Orthogonalise stacks that all replicas hold: each does a part of every stack and gives it to the others."""
    ranks = replicas.size()

    def parts(rank: int) -> "list[torch.Tensor]":  # turns differ, so that single matrices do not all fall to one rank
        return [stack.tensor_split(ranks)[(rank + turn) % ranks] for turn, stack in enumerate(stacks)]

    own = torch.cat([orthogonalize(part, steps).flatten() for part in parts(replicas.rank())])
    counts = [sum(part.numel() for part in parts(rank)) for rank in range(ranks)]
    sent = torch.nn.functional.pad(own, (0, max(counts) - own.numel()))
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent, replicas)
    for rank, flat in enumerate(received):
        pieces = flat[: counts[rank]].split([part.numel() for part in parts(rank)])
        for part, piece in zip(parts(rank), pieces, strict=True):
            part.copy_(piece.view_as(part))
    return stacks


@dataclass(frozen=True)
class Matrices:
    """The matrices of one parameter that share a shape, as this rank holds them."""

    shape: tuple[int, int]
    """Rows and columns of one whole matrix, as in the stack."""
    transposed: bool
    """Whether the stack holds their transposes: tall matrices share a stack with wide ones where they are whole."""
    update_SMN: torch.Tensor
    """The local part of their updates."""
    parameter_view: torch.Tensor
    """The local part of the parameter that they update, of any shape with the same elements in the same order."""
    mesh: DeviceMesh | None
    """The device mesh whose ranks hold parts of a matrix; None where this rank holds whole ones."""
    placements: tuple[Placement, ...]
    """How `[S, M, N]` is laid out over that mesh."""

    @property
    def bucket(self) -> Any:
        """Matrices with equal buckets are orthogonalised together."""
        return self.shape, self.update_SMN.shape[1:], self.mesh, self.placements


def split_matrices(parameter: torch.Tensor, update: torch.Tensor, layout: str) -> list[Matrices]:
    """Return the matrices of a parameter with the local part of their updates.

    Layout "stack": the last two dimensions are a matrix, those before them count matrices. Layout "qkv":
    `[K, G + 2, N, D]`, K groups of G query heads, a key head and a value head of size N: the matrices are those of
    the separate projections, `[K * G * N, D]` for queries and `[K * N, D]` for keys and values.
    """
    own = local(parameter)
    mesh, placements = _matrix_sharding(parameter, layout)
    if layout == "stack":
        stack = update.reshape(-1, *update.shape[-2:])
        return [_matrices((parameter.shape[-2], parameter.shape[-1]), stack, own, mesh, placements)]
    heads, group_rows, size, hidden = parameter.shape
    found = []
    for start, end in ((0, group_rows - 2), (group_rows - 2, group_rows - 1), (group_rows - 1, group_rows)):
        shape = (heads * (end - start) * size, hidden)
        rows = update[:, start:end].reshape(1, -1, update.shape[-1])
        found.append(_matrices(shape, rows, own[:, start:end], mesh, placements))
    return found


def _matrices(
    shape: tuple[int, int],
    update_SMN: torch.Tensor,
    parameter_view: torch.Tensor,
    mesh: DeviceMesh | None,
    placements: tuple[Placement, ...],
) -> Matrices:
    if mesh is None and shape[0] > shape[1]:
        return Matrices((shape[1], shape[0]), True, update_SMN.mT, parameter_view, mesh, placements)
    return Matrices(shape, False, update_SMN, parameter_view, mesh, placements)


def _matrix_sharding(parameter: torch.Tensor, layout: str) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """Return the part of a parameter's mesh whose ranks hold parts of a matrix, and how `[S, M, N]` lies on it."""
    if not isinstance(parameter, DTensor):
        return None, ()
    # Dimension of the parameter -> dimension of [S, M, N]; what is missing counts whole matrices.
    rows_columns = {0: 1, 3: 2} if layout == "qkv" else {parameter.ndim - 2: 1, parameter.ndim - 1: 2}
    mesh = parameter.device_mesh
    sharded = []
    for axis, placement in enumerate(parameter.placements):
        dim = getattr(placement, "dim", None)
        assert layout != "qkv" or dim in (None, 0, 3), "q, k and v are sharded by group or by hidden dimension"
        if dim in rows_columns and mesh.size(axis) > 1:
            assert type(placement) is Shard, f"{placement}: no dimension of a matrix may be sharded twice"
            sharded.append((axis, Shard(rows_columns[dim])))
    if not sharded:
        return None, ()
    if len(sharded) < mesh.ndim:
        assert mesh.mesh_dim_names is not None
        mesh = mesh[tuple(mesh.mesh_dim_names[axis] for axis, _ in sharded)]
    return mesh, tuple(placement for _, placement in sharded)


def _orthogonalize_stack(stacked_SMN: torch.Tensor, like: Matrices, steps: int) -> torch.Tensor:
    if like.mesh is None:
        return orthogonalize(stacked_SMN, steps)
    shape = torch.Size((stacked_SMN.shape[0], *like.shape))
    stride = (like.shape[0] * like.shape[1], like.shape[1], 1)
    stack = DTensor.from_local(stacked_SMN, like.mesh, like.placements, run_check=False, shape=shape, stride=stride)
    owned = [Shard(0)] * len(like.placements)
    whole = stack.redistribute(placements=owned)
    done_SMN = orthogonalize(whole.to_local(), steps).to(stacked_SMN.dtype)
    done = DTensor.from_local(done_SMN.contiguous(), like.mesh, owned, run_check=False, shape=shape, stride=stride)
    return done.redistribute(placements=like.placements).to_local()


def _chunks(bucket: list[Matrices]) -> Iterable[list[Matrices]]:
    """Cut a bucket into lists of at most `BATCH_ELEMENTS` elements a rank of whole matrices, or single entries.

    Sharded matrices are divided among the ranks of their mesh, so a list is as many times longer: with less, one rank
    would work and the others wait.
    """
    most = BATCH_ELEMENTS * (bucket[0].mesh.size() if bucket[0].mesh else 1)
    chunk: list[Matrices] = []
    held = 0
    for matrices in bucket:
        size = matrices.update_SMN.shape[0] * matrices.shape[0] * matrices.shape[1]
        if chunk and held + size > most:
            yield chunk
            chunk, held = [], 0
        chunk.append(matrices)
        held += size
    if chunk:
        yield chunk
