"""How far two sets of answers agree."""


def agreement(one, two):
    """Share of the tokens before the first one that differs."""
    same = 0
    for a, b in zip(one, two, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, one))
