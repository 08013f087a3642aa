"""Sizes of what is reduced and sharded, in numbers (not bytes): what the engine runs with, and `plan` counts on.

Knows neither torch nor DeepSpeed.
"""

from __future__ import annotations

# ZeRO 0, our own: a message of gradients, 25 MiB of fp32, unless one parameter alone has more.
MESSAGE = 25 * 2**18
# The same of DeepSpeed. It allocates the whole bucket; its own default of 5e8 takes 2 GB of fp32 (4 GB where reduction
# overlaps backward) beside a model of any size.
REDUCE_BUCKET = 50_000_000
# ZeRO 3 never shards a parameter smaller than this, keeps at most LIVE gathered numbers, and fetches PREFETCH ahead.
PERSISTENT = 100_000
LIVE = 1_000_000_000
PREFETCH = 50_000_000


def reduce_bucket(numbers: int) -> int:
    """Bucket size for a rank that holds `numbers` before sharding."""
    return max(1, min(REDUCE_BUCKET, numbers))
