"""What happened so far."""

import dataclasses


@dataclasses.dataclass
class Counters:
    """Events since the manager was made; pages unless said otherwise."""

    seals: int = 0
    rejected: int = 0  # left at level 0 because a value was not finite
    demotions: int = 0  # level 1 to 2
    promotions: int = 0  # level 2 to 1
    refusals: int = 0  # promotions asked for without a kept fine plane or a free chunk
    unrefined: int = 0  # sealed at level 2 because there was no chunk for level 1
    evictions: int = 0
    prefix_hits: int = 0  # sequences that began with a remembered prefix
    prefix_hit_tokens: int = 0  # tokens that they were not fed for it
    prefix_evictions: int = 0  # prefixes that went because their pages were needed
    pages_merged: int = 0  # pages of one sequence replaced by equal ones of another
    windows_dropped: int = 0  # raw ends of prefixes that had to go for lack of host memory
    forks: int = 0  # sequences
    preemptions: int = 0  # sequences
    resumes: int = 0  # sequences
