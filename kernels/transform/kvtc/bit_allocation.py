"""Split a bit budget among components so that the sum of their squared errors is least."""

import heapq
from collections.abc import Sequence


def allocate_bits(variances: Sequence[float], total_bits: int, max_bits: int = 8) -> list[int]:
    """Give whole bits per component that minimise ``sum variance * 4^-bits``.

    Each bit goes where it lowers the sum most. The gain of a component's next bit falls with each bit it has, so this
    is the optimum, the same that dynamic programming over (component, bits left) finds. With fractional bits it is
    reverse water-filling, ``max(0, 1/2 log2(variance / level))`` (Cover and Thomas, section 10.3).

    Raises
    ------
    ValueError
        If a variance or the budget is negative.
    """
    if total_bits < 0 or any(variance < 0 for variance in variances):
        raise ValueError("variances and total_bits must not be negative")
    bits = [0] * len(variances)
    # A heap of errors as they stand: one more bit removes three quarters of the largest.
    heap = [(-variance, index) for index, variance in enumerate(variances) if variance > 0]
    heapq.heapify(heap)
    for _ in range(total_bits):
        while heap and bits[heap[0][1]] == max_bits:
            heapq.heappop(heap)
        if not heap:
            break
        error, index = heap[0]
        bits[index] += 1
        heapq.heapreplace(heap, (error / 4, index))
    return bits
