"""How a run is spread over processes, as numbers; `glm45.training.parallel` makes it so."""

import dataclasses
from typing import Literal

from glm45.config import configuration
from glm45.model.config import ModelConfig


@configuration
class Layout:
    """Sizes of the device mesh. Not in the report, which names no hardware.

    Ranks are numbered with tensor parallelism innermost, then context, shard, replicate, and pipeline outermost, so
    that what talks most sits closest.
    """

    replicate: int = -1
    """Copies of the model, gradients all-reduced between them; -1 takes all ranks that the others leave."""
    shard: int = 1
    """Ranks over which weights, gradients and optimiser state are sharded (FSDP2)."""
    context: int = 1
    """Ranks over which a row's tokens are divided; attention trades heads for tokens (Ulysses)."""
    tensor: int = 1
    """Ranks over which heads and feed-forward widths are divided; tokens between the blocks (sequence parallel).
    With `expert` above 1, routed and shared experts keep their widths and take the tokens as they lie."""
    expert: int = 1
    """Ranks over which the experts are divided, tokens sent by all-to-all; divides
    `shard * context * tensor`."""
    pipeline: int = 1
    """Groups of consecutive layers on ranks of their own."""
    pipeline_schedule: Literal["1f1b", "interleaved"] = "1f1b"
    """Pipeline schedule; interleaved gives each rank two groups of layers."""

    def world_size(self) -> int:
        """Return the number of ranks that the layout needs, one copy if `replicate` is open."""
        return max(self.replicate, 1) * self.ranks_per_copy

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that one copy of the model takes."""
        return self.shard * self.context * self.tensor * self.pipeline

    @property
    def is_data_parallel(self) -> bool:
        """Whether every rank can run whole rows by itself, calls of the model being the only collective."""
        return self.context == self.tensor == self.pipeline == 1

    def resolve(self, world_size: int) -> "Layout":
        """Return the layout for `world_size` ranks, its `replicate` settled. Raises ValueError if it does not fit."""
        replicate = self.replicate if self.replicate > 0 else max(1, world_size // self.ranks_per_copy)
        settled = dataclasses.replace(self, replicate=replicate)
        if settled.world_size() != world_size:
            raise ValueError(
                f"the layout needs {settled.world_size()} processes (replicate {replicate} x shard {self.shard} x "
                f"context {self.context} x tensor {self.tensor} x pipeline {self.pipeline}) and there are "
                f"{world_size}: start it with torchrun --nproc-per-node, or change layout.*"
            )
        return settled

    def check(self, model: ModelConfig, sequence_lengths: list[int]) -> None:
        """Raise ValueError, with numbers, for a model that cannot be divided so."""
        for holds, problem in self._conditions(model, sequence_lengths):
            if not holds:
                raise ValueError(f"layout: {problem}")

    def _conditions(self, model: ModelConfig, sequence_lengths: list[int]) -> list[tuple[bool, str]]:
        tensor, context, hidden = self.tensor, self.context, model.hidden_size
        stages = self.pipeline * (2 if self.pipeline_schedule == "interleaved" else 1)
        widths = {
            "num_key_value_heads": model.num_key_value_heads,
            "intermediate_size": model.intermediate_size,
        }
        if self.expert == 1:
            widths["moe_intermediate_size"] = model.moe_intermediate_size
        tokens, kv_heads = tensor * context, max(1, model.num_key_value_heads // tensor)
        return [
            (self.replicate != 0 and min(self.shard, context, tensor, self.expert, self.pipeline) >= 1,
             "every size must be 1 or more (replicate may be -1)"),
            *((width % tensor == 0, f"tensor {tensor} does not divide {name} {width}")
              for name, width in widths.items()),
            (hidden % (self.shard * context) == 0,
             f"shard * context {self.shard * context} does not divide hidden_size {hidden}"),
            (model.num_attention_heads % (context * tensor) == 0,
             f"context * tensor {context * tensor} does not divide num_attention_heads {model.num_attention_heads}"),
            (max(context, kv_heads) % min(context, kv_heads) == 0,
             f"context {context} and the {kv_heads} key/value heads of a rank: one must divide the other"),
            (all(length % tokens == 0 for length in sequence_lengths),
             f"tensor * context {tokens} does not divide every sequence length of {sequence_lengths}"),
            (model.n_routed_experts % self.expert == 0,
             f"expert {self.expert} does not divide n_routed_experts {model.n_routed_experts}"),
            (self.shard * tokens % self.expert == 0,
             f"expert {self.expert} does not divide shard * context * tensor {self.shard * tokens}"),
            (stages <= model.num_hidden_layers,
             f"{stages} pipeline stages are more than num_hidden_layers {model.num_hidden_layers}"),
        ]  # fmt: skip
