"""Which samples share a row of limited length. Pure functions of lengths."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence


def best_fit(lengths: Sequence[int], capacity: int, *, decreasing: bool = True) -> list[list[int]]:
    """Indices grouped so that each group's lengths sum to at most `capacity`, in few groups; O(n log n).

    Best-fit decreasing (Johnson et al., 1974, doi:10.1137/0203025: at most 11/9 of the optimum + 4 groups),
    or with `decreasing=False` the items in their given order (at most 1.7 of it), which keeps groups a random
    mix of lengths if the order is random. An item longer than `capacity` is a group of its own. Groups come
    in the order in which they were opened, and indices ascend inside a group.
    """
    order = (
        sorted(range(len(lengths)), key=lambda i: -lengths[i]) if decreasing else list(range(len(lengths)))
    )
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in order:
        at = bisect_left(rooms, lengths[index])
        if at < len(rooms):
            room = rooms[at]
            group = with_room[room].pop()
            groups[group].append(index)
            if not with_room[room]:
                del with_room[rooms.pop(at)]
        else:
            room, group = capacity, len(groups)
            groups.append([index])
        left = room - lengths[index]
        if left > 0:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(group)
    return [sorted(group) for group in groups]


def by_length(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices grouped so that each group's count times its longest item is at most `capacity`.

    The longest items share the first group, so that padding them to one length wastes little. An item longer than
    `capacity` is a group of its own. Indices ascend inside a group.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room = 0
    for index in order:
        if room == 0:
            groups.append([])
            room = max(1, capacity // max(1, lengths[index]))
        groups[-1].append(index)
        room -= 1
    return [sorted(group) for group in groups]


def in_order(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Consecutive indices grouped so that each group's lengths sum to at most `capacity`; the order is kept.

    An item longer than `capacity` is a group of its own.
    """
    groups: list[list[int]] = []
    room = -1
    for index, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = capacity
        groups[-1].append(index)
        room -= length
    return groups


def exactly(
    count: int,
    lengths: Sequence[int],
    capacity: int,
    pack: Callable[[Sequence[int], int], list[list[int]]],
) -> list[list[int]]:
    """`pack(lengths, capacity)` made into `count` groups, at most as many as there are items.

    Where it gives more, the capacity grows by half a percent at a time until they suffice; where it gives fewer, the
    groups with most items are halved in place.
    """
    groups = pack(lengths, capacity)
    while len(groups) > count:
        capacity += max(1, capacity // 200)
        groups = pack(lengths, capacity)
    while len(groups) < count:
        at = max(range(len(groups)), key=lambda i: (len(groups[i]), -i))
        group, half = groups[at], len(groups[at]) // 2
        groups[at : at + 1] = [group[:half], group[half:]]
    return groups


def greedy_groups(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """LLaMA-Factory's grouping for `packing: true`, index for index.

    A group is filled with the longest remaining item that fits, again and again, then the next group is
    opened; of equally long items the last one goes first. Items longer than `capacity` are left out, as that
    tool does.
    """
    left = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    left = [index for index in left if lengths[index] <= capacity]
    sizes = [lengths[index] for index in left]
    groups: list[list[int]] = []
    while left:
        group: list[int] = []
        room = capacity
        while (at := bisect_right(sizes, room)) > 0:
            room -= sizes.pop(at - 1)
            group.append(left.pop(at - 1))
        groups.append(group)
    return groups


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices spread over `parts` lists of nearly equal total length: the longest first, to the shortest
    list.

    Graham's rule (1969, doi:10.1137/0117039): the largest total is at most 4/3 of the best possible one.
    """
    totals = [0] * parts
    lists: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = min(range(parts), key=lambda p: (totals[p], p))
        totals[part] += lengths[index]
        lists[part].append(index)
    return [sorted(indices) for indices in lists]
