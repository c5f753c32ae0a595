"""The reference backend: the training model's own forward over a paged cache.

The same module object that is trained is run, so its weights are live. It runs wherever the model runs, on GPUs too.
`kernels.decode` is the fast backend on CPU, held to this one by tests.

S sequences, N rows, k drafts, L context length, C number of blocks, Z block size, H query heads, K key/value heads,
D head size, V vocabulary, M blocks a table. Hidden states are `[N, hidden]`.
"""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from glm45.engine.batch import Batch
from glm45.engine.sampling import DRAFT_STREAM, Draws, draw, probabilities, tempered, uniforms, verify
from glm45.model.transformer import Glm45


class Backend(Protocol):
    """What the runner needs: a forward over paged sequences, the head, draws."""

    name: str
    """For reports."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Store the rows' keys and values and return their hidden states `[N, hidden]` after the final norm."""
        ...

    def draft(
        self, batch: Batch, hidden: torch.Tensor, chosen: list[int], draws: Draws, num_drafts: int
    ) -> tuple[list[list[int]], torch.Tensor]:
        """Run the MTP layer, then draft tokens for the chosen sequences of the batch, each after its last row.

        Rows are next tokens, `hidden` the states before them; `draws` is of the chosen sequences. Returns k tokens a
        sequence and the distributions `[S, k, V]` that they were drawn from: temperature alone shapes them.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits `[N, V]` of hidden states."""
        ...

    def sample(self, logits: torch.Tensor, draws: Draws) -> tuple[list[list[int]], list[list[float]]]:
        """Draw where temperature alone shapes the distribution, verifying drafts (see `sampling.verify`).

        Returns each sequence's new tokens and their log-probabilities.
        """
        ...

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to), all layers."""
        ...

    def refresh(self) -> None:
        """The model's weights have changed."""
        ...


class PagedView:
    """The `Cache` that the attention layers see in one forward: where the batch's rows are and what they may see."""

    def __init__(self, stored: torch.Tensor, batch: Batch) -> None:
        self.stored = stored  # [layer, 2, C, Z, K, D]
        device, block_size = stored.device, stored.shape[3]
        tables_SM = batch.tables
        blocks_N = tables_SM[batch.sequence_of_row, batch.slots_N // block_size]
        self.places_N = torch.from_numpy(blocks_N * block_size + batch.slots_N % block_size).to(device)
        self.groups = [self._group(batch, tables_SM, block_size, chosen) for chosen in self._by_length(batch)]

    @staticmethod
    def _by_length(batch: Batch) -> list[np.ndarray]:
        """Sequences with equally many rows go through attention together: decoding ones, then each prompt chunk."""
        counts_S = np.diff(batch.starts_S1)
        return [np.flatnonzero(counts_S == count) for count in np.unique(counts_S)]

    def _group(
        self, batch: Batch, tables_SM: np.ndarray, block_size: int, chosen_S: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row indices `[S, T]`, cache places `[S, L]` and the mask `[S, 1, T, L]` of some sequences."""
        starts_S = batch.starts_S1[:-1][chosen_S]
        num_rows = int(batch.starts_S1[1:][chosen_S[0]] - starts_S[0])
        rows_ST = starts_S[:, None] + np.arange(num_rows)
        slots_ST = batch.slots_N[rows_ST]
        seen_L = np.arange(int(slots_ST.max()) + 1)
        places_SL = tables_SM[chosen_S][:, seen_L // block_size] * block_size + seen_L % block_size
        mask_STL = (seen_L <= slots_ST[:, :, None]) & (seen_L >= batch.first_slot)
        rows, places, mask = (torch.from_numpy(x) for x in (rows_ST, places_SL, mask_STL[:, None]))
        return rows.to(self.stored.device), places.to(self.stored.device), mask.to(self.stored.device)

    def attend(
        self, layer: int, q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `model.cache.Cache`: B is 1 and T is all rows."""
        keys, values = self.stored[layer].flatten(1, 2)
        keys[self.places_N] = k_BTKD[0].to(keys.dtype)
        values[self.places_N] = v_BTKD[0].to(values.dtype)
        out_BTHD = torch.empty_like(q_BTHD)
        for rows_ST, places_SL, mask in self.groups:
            out_SHTD = F.scaled_dot_product_attention(
                q_BTHD[0, rows_ST].transpose(1, 2),
                keys[places_SL].to(q_BTHD.dtype).transpose(1, 2),
                values[places_SL].to(q_BTHD.dtype).transpose(1, 2),
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
            out_BTHD[0, rows_ST] = out_SHTD.transpose(1, 2)
        return out_BTHD


class ModelBackend:
    """Runs the model itself. See `Backend`."""

    name = "model"

    def __init__(self, model: Glm45, num_blocks: int, block_size: int) -> None:
        config = model.config
        self.model = model
        num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        shape = (num_layers, 2, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        # bf16 where the model computes in bf16: the products that read keys and values are in bf16 anyway.
        self.stored = torch.zeros(shape, dtype=model.compute_dtype, device=model.device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """See `Backend`."""
        tokens, positions = self._row(batch.tokens_N), self._row(batch.positions_N)
        view = PagedView(self.stored, batch)
        return self.model(tokens, positions=positions, cache=view, output="hidden").hidden_BTD[0]

    @torch.inference_mode()
    def draft(
        self, batch: Batch, hidden: torch.Tensor, chosen: list[int], draws: Draws, num_drafts: int
    ) -> tuple[list[list[int]], torch.Tensor]:
        """See `Backend`."""
        hidden = self._run_mtp(batch, hidden)[batch.starts_S1[1:][chosen].astype(np.int64) - 1]
        drafts: list[list[int]] = [[] for _ in chosen]
        probs: list[torch.Tensor] = []
        while chosen and len(probs) < num_drafts:
            if probs:
                batch = batch.following(chosen, [tokens[-1] for tokens in drafts])
                chosen = list(range(len(chosen)))
                hidden = self._run_mtp(batch, hidden)
            probs.append(probabilities(self.logits(hidden), draws.temperatures_S))
            positions_S = draws.positions_S + np.uint64(len(probs) - 1)
            drawn = draw(probs[-1], uniforms(draws.seeds_S, positions_S, DRAFT_STREAM))
            for tokens, token in zip(drafts, drawn.tolist(), strict=True):
                tokens.append(token)
        return drafts, torch.stack(probs, 1) if probs else hidden.new_zeros(0)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Backend`."""
        return self.model.lm_head(hidden.to(self.model.compute_dtype)).float()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, draws: Draws) -> tuple[list[list[int]], list[list[float]]]:
        """See `Backend`."""
        starts = draws.starts.tolist()
        temperatures_N = np.repeat(draws.temperatures_S, np.diff(starts))
        tokens = verify(probabilities(logits, temperatures_N), draws)
        logprobs_NV = torch.log_softmax(tempered(logits, temperatures_N), dim=-1)
        return tokens, [
            logprobs_NV[range(start, start + len(new)), new].tolist()
            for start, new in zip(starts, tokens, strict=False)
        ]

    @torch.inference_mode()
    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """See `Backend`."""
        sources, targets = zip(*copies, strict=True)
        self.stored[:, :, list(targets)] = self.stored[:, :, list(sources)]

    def refresh(self) -> None:
        """See `Backend`: the model's own parameters are read, so there is nothing to do."""

    def _run_mtp(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        tokens, positions = self._row(batch.tokens_N), self._row(batch.positions_N)
        view = PagedView(self.stored, batch)
        _, drafted = self.model.draft(tokens, hidden[None].to(self.model.compute_dtype), positions, view)
        return drafted[0]

    def _row(self, values_N: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_N.astype(np.int64))[None].to(self.model.device)
