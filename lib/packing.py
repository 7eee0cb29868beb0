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

    # From here on, numbers of micro-batches per process.
    fewest = math.ceil(fewest / world_size)
    enough = math.ceil(enough / world_size)
    few_rows = len(lengths) <= FEW_ROWS

    # Upward from the lower bound, to which the first count that is enough is close as a rule.
    tries = TRIES if few_rows else 1
    last_try = min(enough, fewest + tries) - 1
    for count in range(fewest, last_try + 1):
        bins = deal(lengths, order, budget, count * world_size)
        if bins:
            return by_process(bins, world_size)

    # Else by bisection, up to the upper bound, which is enough. With many rows a deal costs more
    # than it saves, so a count within 1/64 of the best one will do.
    tolerance = 1
    if not few_rows:
        tolerance = max(1, fewest // 64)
    too_few = last_try
    bins = deal(lengths, order, budget, enough * world_size)
    while enough - too_few > tolerance:
        count = (too_few + enough) // 2
        better = deal(lengths, order, budget, count * world_size)
        if better:
            enough = count
            bins = better
        else:
            too_few = count
    return by_process(bins, world_size)


def by_process(bins: list, world_size: int) -> list[list]:
    """Every world_size-th bin for each process."""
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

        # There are `number` rows of at least this length.
        rows_per_bin = budget // length
        fewest = max(fewest, math.ceil(number / rows_per_bin))

        # The emptiest bin has at most the mean of what was dealt before: does this row fit on top?
        # If not, there has to be a bin without a row.
        needed = number
        room_for_others = budget - length
        if room_for_others > 0:
            needed = min(needed, math.ceil(before / room_for_others))
        enough = max(enough, needed)
        before += length

    # All tokens have to go somewhere.
    fewest = max(fewest, math.ceil(before / budget))
    return fewest, enough


def deal(lengths: list[int], order: list[int], budget: int, count: int) -> list[list[int]] | None:
    """Deal row numbers to `count` bins, in this order, each to the bin with the fewest tokens.

    None if a bin would get several rows with more than `budget` tokens.
    """
    # The longest rows open a bin each.
    bins = [[] for _ in range(count)]
    emptiest = []  # a heap of (tokens, bin number)
    for number, row in enumerate(order[:count]):
        bins[number].append(row)
        emptiest.append((lengths[row], number))
    heapq.heapify(emptiest)

    for row in order[count:]:
        tokens, number = emptiest[0]
        tokens += lengths[row]
        if tokens > budget:
            return None
        bins[number].append(row)
        heapq.heapreplace(emptiest, (tokens, number))
    return bins


def rows_by_prompt(
    rows: list[int],
    prompts: list[int],
    prompt_lengths: list[int],
    lengths: list[int],
    budget: int,
    world_size: int,
) -> tuple[list[list[int]], list[int]]:
    """(groups of rows that share a prompt, tokens of each group, which count the prompt once).

    prompts: the number of each row's prompt. No group has more tokens than `budget`, and none more
    than each process would get of an even share, unless a single row has.

    >>> rows_by_prompt([0, 1, 2], [0, 0, 1], [2, 2, 2], [4, 3, 5], budget=9, world_size=1)
    ([[0, 1], [2]], [5, 5])
    """
    limit = min(budget, fair_share(rows, prompts, prompt_lengths, lengths, world_size))
    groups = []
    tokens = []
    newest = {}  # prompt -> the number of its newest group
    for row in rows:
        answer = lengths[row] - prompt_lengths[row]
        number = newest.get(prompts[row])
        if number is not None and tokens[number] + answer <= limit:
            groups[number].append(row)
            tokens[number] += answer
        else:
            newest[prompts[row]] = len(groups)
            groups.append([row])
            tokens.append(lengths[row])
    return groups, tokens


def fair_share(
    rows: list[int],
    prompts: list[int],
    prompt_lengths: list[int],
    lengths: list[int],
    world_size: int,
) -> int:
    """Tokens per process if all rows of a prompt shared it."""
    prompt_tokens = {prompts[row]: prompt_lengths[row] for row in rows}
    answer_tokens = sum(lengths[row] - prompt_lengths[row] for row in rows)
    total = answer_tokens + sum(prompt_tokens.values())
    return math.ceil(total / world_size)
