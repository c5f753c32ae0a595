"""Blocks are neither lost nor shared by accident, and a known prefix is found exactly."""

from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.engine.blocks import BlockManager


def filled(blocks, token_ids):
    table = blocks.match(token_ids)
    assert blocks.grow(table, len(token_ids), len(table.blocks) * blocks.block_size) == []
    blocks.commit(table, token_ids, len(token_ids))
    return table


def test_equal_prefixes_share_whole_blocks_and_leave_a_token_to_compute():
    blocks = BlockManager(16, 4)
    first = filled(blocks, list(range(12)))
    assert list(blocks.match(list(range(12))).blocks) == list(first.blocks[:2])
    assert list(blocks.match([*range(9), 99]).blocks) == list(first.blocks[:2])
    assert list(blocks.match([9, *range(1, 12)]).blocks) == []


def test_a_new_weight_version_forgets_every_prefix():
    blocks = BlockManager(16, 4)
    table = filled(blocks, list(range(12)))
    blocks.new_version(1)
    assert len(blocks.match(list(range(12))).blocks) == 0
    blocks.commit(table, list(range(12)), 12)  # computed under the old weights: must not come back
    assert len(blocks.match(list(range(12))).blocks) == 0
    blocks.release(table)
    blocks.check([])


def test_released_prefixes_stay_until_their_blocks_are_needed_and_the_oldest_goes_first():
    blocks = BlockManager(4, 4)
    for start in (0, 100):
        blocks.release(filled(blocks, [start + i for i in range(8)]))
    assert blocks.num_cached == 4
    assert blocks.num_available == 4
    table = filled(blocks, [50, 51, 52, 53])
    assert len(blocks.match([*range(100, 108), 0]).blocks) == 2
    assert len(blocks.match([*range(8), 0]).blocks) == 1  # its last block went, its first is still known
    assert len(table.blocks) == 1


def test_a_forked_table_is_copied_on_write_only():
    blocks = BlockManager(8, 4)
    table = filled(blocks, list(range(6)))
    fork = blocks.fork(table)
    [(source, target)] = blocks.grow(fork, 7, 6)
    assert source == table.blocks[1]
    assert fork.blocks[1] == target != source
    assert fork.blocks[0] == table.blocks[0]
    assert blocks.grow(table, 7, 6) == []  # the last holder writes in place
    blocks.check([table, fork])


def test_growth_without_enough_blocks_changes_nothing():
    blocks = BlockManager(3, 4)
    table = filled(blocks, list(range(8)))
    before = list(table.blocks)
    assert blocks.grow(table, 100, 8) is None
    assert list(table.blocks) == before
    blocks.check([table])


operations = st.lists(st.tuples(st.sampled_from(["new", "append", "fork", "drop", "version"]), st.integers(0, 99)))


@settings(max_examples=80, deadline=None)
@given(operations)
def test_any_history_keeps_the_invariants_and_every_sequence_reads_what_it_wrote(history):
    """A shadow memory stands for the cache: what a sequence finds in its blocks must always be its own tokens."""
    blocks, memory, live = BlockManager(12, 2), {}, []

    def write(tokens, table, start):
        copies = blocks.grow(table, len(tokens), start)
        if copies is None:
            return False
        for source, target in copies:
            for offset in range(2):
                memory[target, offset] = memory.get((source, offset))
        for i in range(start, len(tokens)):
            memory[table.blocks[i // 2], i % 2] = (blocks.version, tuple(tokens[: i + 1]))
        blocks.commit(table, tokens, len(tokens))
        return True

    for operation, number in history:
        if operation == "new":
            tokens = [(number >> i) & 1 for i in range(1 + number % 7)]
            table = blocks.match(tokens)
            if write(tokens, table, 2 * len(table.blocks)):
                live.append((tokens, table))
            else:
                blocks.release(table)
        elif operation == "version":
            blocks.new_version(blocks.version + 1)
        elif live:
            tokens, table = live[number % len(live)]
            if operation == "append":
                write([*tokens, number % 2], table, len(tokens)) and tokens.append(number % 2)
            elif operation == "fork":
                live.append((list(tokens), blocks.fork(table)))
            else:
                live.pop(number % len(live))
                blocks.release(table)
        blocks.check([table for _, table in live])
        for tokens, table in live:
            for i in range(len(tokens)):
                assert memory[table.blocks[i // 2], i % 2][1] == tuple(tokens[: i + 1])
