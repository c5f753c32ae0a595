"""Which block of the paged cache holds which tokens: allocation, sharing, prefix cache. Knows no tensors.

A block holds `block_size` tokens. Every block is in one of three states: in use (one or more references), cached
(no reference, but its contents are still known by their hash), or free. Full blocks are known by a hash chain, so
that equal prefixes share blocks; the chain starts from the version of the weights, so that keys and values of old
weights are never reused.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order, and the hashes of its full ones."""

    blocks: array = field(default_factory=lambda: array("i"))
    hashes: list[bytes] = field(default_factory=list)
    """Hash chain over the first full blocks, as far as they have been committed."""
    version: int = -1
    """Version of the weights that computed every one of the tokens so far."""


class BlockManager:
    """Hands out blocks, counts references and remembers full blocks by content."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache of {num_blocks} blocks of {block_size} tokens is empty: give at least one")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.version = 0
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_in_use(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - self.num_available

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to, kept for their contents."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks that many tokens take."""
        return -(-num_tokens // self.block_size)

    def match(self, token_ids: Tokens[int]) -> BlockTable:
        """Return a table that shares the longest known prefix, whole blocks, at least one token left to compute."""
        table = BlockTable(version=self.version)
        if not self.prefix_cache:
            return table
        parent = self._root()
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            parent = self._digest(parent, token_ids[start : start + self.block_size])
            block = self._block_of.get(parent)
            if block is None:
                break
            self._take_shared(block)
            table.blocks.append(block)
            table.hashes.append(parent)
        return table

    def grow(self, table: BlockTable, num_tokens: int, first_new: int) -> list[tuple[int, int]] | None:
        """Make room for `num_tokens` tokens, of which those from index `first_new` on will be written.

        Shared blocks that would be written to are replaced by copies. Returns the pairs (from, to) of blocks to
        copy, or None, with nothing changed, if there are not enough blocks.
        """
        size, blocks, references = self.block_size, table.blocks, self._references
        first_written, wanted = first_new // size, -(-num_tokens // size) - len(blocks)
        if wanted <= 0 and first_written == len(blocks) - 1 and references[blocks[-1]] == 1:
            return []  # decoding, fifteen times of sixteen
        shared = [i for i in range(first_written, len(blocks)) if references[blocks[i]] > 1]
        if max(wanted, 0) + len(shared) > self.num_available:
            return None
        copies = []
        for i in shared:
            block = self._take_new()
            copies.append((table.blocks[i], block))
            self._release(table.blocks[i])
            table.blocks[i] = block
        table.blocks.extend([self._take_new() for _ in range(wanted)])
        return copies

    def fork(self, table: BlockTable) -> BlockTable:
        """Return a table that shares every block; whoever writes first gets a copy (see `grow`)."""
        for block in table.blocks:
            self._references[block] += 1
        return BlockTable(table.blocks[:], list(table.hashes), table.version)

    def commit(self, table: BlockTable, token_ids: Tokens[int], num_computed: int) -> None:
        """Remember the full blocks among the first `num_computed` tokens by their hash.

        Blocks computed under mixed weight versions are not remembered.
        """
        if not self.prefix_cache or table.version != self.version:
            return
        while len(table.hashes) < num_computed // self.block_size:
            start = len(table.hashes) * self.block_size
            parent = table.hashes[-1] if table.hashes else self._root()
            digest = self._digest(parent, token_ids[start : start + self.block_size])
            block = table.blocks[len(table.hashes)]
            table.hashes.append(digest)
            if digest not in self._block_of and self._hash_of[block] is None:
                self._block_of[digest] = block
                self._hash_of[block] = digest

    def release(self, table: BlockTable) -> None:
        """Give up a table's blocks. Its last blocks are the first to be reused: prefixes are worth more."""
        for block in reversed(table.blocks):
            self._release(block)
        del table.blocks[:]
        table.hashes.clear()

    def new_version(self, version: int) -> None:
        """Forget every known prefix: the weights have changed. Blocks in use stay in use."""
        self.version = version
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks

    def check(self, tables: list[BlockTable]) -> None:
        """Assert every invariant, given all tables that exist (for tests and debugging)."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table.blocks:
                counts[block] += 1
        assert counts == self._references, "references differ from the tables"
        idle = sorted([*self._free, *self._cached])
        assert idle == [block for block in range(self.num_blocks) if not counts[block]], "an idle block is lost"
        assert all(self._hash_of[block] is None for block in self._free), "a free block still has a hash"
        assert all(self._hash_of[block] == digest for digest, block in self._block_of.items()), "a hash is stale"

    def _root(self) -> bytes:
        return self.version.to_bytes(8, "little", signed=True)

    @staticmethod
    def _digest(parent: bytes, token_ids: Tokens[int]) -> bytes:
        return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()

    def _take_shared(self, block: int) -> None:
        if not self._references[block]:
            del self._cached[block]
        self._references[block] += 1

    def _take_new(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None
            del self._block_of[digest]
            self._hash_of[block] = None
        self._references[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, f"block {block} released more often than taken"
        if self._references[block]:
            return
        if self._hash_of[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None
