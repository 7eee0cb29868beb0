"""How rows of different lengths are dealt to micro-batches of about as many tokens."""

import heapq
import math

# With at most FEW_ROWS rows, so many numbers of micro-batches are tried one after the other.
TRIES = 16
FEW_ROWS = 2048


def micro_batches(lengths: list[int], budget: int, world_size: int) -> list[list[list[int]]]:
    """Deal rows to micro-batches of at most `budget` tokens; a longer row gets one of its own.

    Returns one list per process, of lists of row numbers. All processes get the same number of
    micro-batches, because every pass is a collective; the last ones of a process may be empty.

    >>> micro_batches([4, 3, 2, 1], budget=5, world_size=1)
    [[[0, 3], [1, 2]]]
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    fewest, enough = bounds(lengths, order, budget)
    fewest = math.ceil(fewest / world_size)
    enough = math.ceil(enough / world_size)

    # Upward from the lower bound, to which the first count that is enough is close as a rule.
    tries = TRIES if len(lengths) <= FEW_ROWS else 1
    for count in range(fewest, min(enough, fewest + tries)):
        bins = deal(lengths, order, budget, count * world_size)
        if bins:
            return [bins[rank::world_size] for rank in range(world_size)]

    # Else by bisection, up to the upper bound, which is enough. With many rows a deal costs more
    # than it saves, so a count within 1/64 of the best one will do.
    tolerance = 1 if len(lengths) <= FEW_ROWS else max(1, fewest // 64)
    too_few = min(enough, fewest + tries) - 1
    bins = deal(lengths, order, budget, enough * world_size)
    while enough - too_few > tolerance:
        count = (too_few + enough) // 2
        better = deal(lengths, order, budget, count * world_size)
        if better:
            enough = count
            bins = better
        else:
            too_few = count
    return [bins[rank::world_size] for rank in range(world_size)]


def bounds(lengths: list[int], order: list[int], budget: int) -> tuple[int, int]:
    """(a number of bins below which no deal() can succeed, one with which it does).

    order: the row numbers, the longest row first.
    """
    fewest = 1
    enough = 1
    before = 0
    for number, row in enumerate(order, start=1):
        length = max(1, min(lengths[row], budget))

        # There are `number` rows of at least this length, and a bin holds budget // length of them.
        fewest = max(fewest, math.ceil(number / (budget // length)))

        # The emptiest bin has at most the mean of what was dealt before: does this row fit on top?
        # If not, there has to be a bin without a row.
        needed = number
        if length < budget:
            needed = min(needed, math.ceil(before / (budget - length)))
        enough = max(enough, needed)
        before += length
    return max(fewest, math.ceil(before / budget)), enough


def deal(lengths: list[int], order: list[int], budget: int, count: int) -> list[list[int]] | None:
    """Deal row numbers to `count` bins, in this order, each to the bin with the fewest tokens.

    None if a bin would get several rows with more than `budget` tokens.
    """
    # The longest rows open a bin each.
    first = order[:count]
    bins = [[row] for row in first] + [[] for _ in range(count - len(first))]
    emptiest = [(lengths[row], number) for number, row in enumerate(first)]
    heapq.heapify(emptiest)  # a heap of (tokens, bin number)

    for row in order[count:]:
        tokens, number = emptiest[0]
        if tokens + lengths[row] > budget:
            return None
        bins[number].append(row)
        heapq.heapreplace(emptiest, (tokens + lengths[row], number))
    return bins
