"""The sizes DeepSpeed's ZeRO is given, in numbers (not bytes): what it runs with, and what `plan` counts on.

Knows neither torch nor DeepSpeed.
"""

from __future__ import annotations

# Gradients are reduced in messages of at most this many. DeepSpeed allocates the whole bucket; its own default of 5e8
# takes 2 GB of fp32 (4 GB where reduction overlaps backward) beside a model of any size.
REDUCE_BUCKET = 50_000_000
# ZeRO 3 never shards a parameter smaller than this, keeps at most LIVE gathered numbers, and fetches PREFETCH ahead.
PERSISTENT = 100_000
LIVE = 1_000_000_000
PREFETCH = 50_000_000


def reduce_bucket(numbers: int) -> int:
    """Bucket size for a rank that holds `numbers` before sharding."""
    return max(1, min(REDUCE_BUCKET, numbers))
