"""What the options of `eval` mean, and what they must not be."""

from __future__ import annotations

import re
from typing import Any

from ray_pipeline.cli.options import check_temperature
from ray_pipeline.errors import UserError

SAMPLED_TEMPERATURE = 0.6  # DeepSeek-R1's (arXiv:2501.12948, §3)
_RANGE = re.compile(r"([1-5])(?:-([1-5]))?")


def sampling(options: dict[str, Any]) -> tuple[int, float, tuple[int, ...]]:
    """Samples, temperature and the k of pass@k.

    Raises:
        UserError: fewer than one sample, equal samples, or a k that there are too few samples for.
    """
    samples, temperature = options["samples"], options["temperature"]
    if samples < 1:
        raise UserError(f"--samples {samples}: a question needs at least one answer. Use --samples 1.")
    if temperature is None:
        temperature = 0.0 if samples == 1 else SAMPLED_TEMPERATURE
    check_temperature(temperature)
    if samples > 1 and temperature == 0:
        raise UserError(
            f"--samples {samples} with --temperature 0: greedy answers to a question are all the same. Use a "
            f"temperature above 0, such as {SAMPLED_TEMPERATURE}, or --samples 1."
        )
    if options["ks"] is None:
        return samples, temperature, tuple(sorted({*(2**i for i in range(samples.bit_length()))} | {samples}))
    try:
        ks = tuple(sorted({int(k) for k in options["ks"].split(",")}))
    except ValueError:
        raise UserError(f"--k {options['ks']}: must be whole numbers with commas between them, such as 1,4.") from None
    if ks[0] < 1 or ks[-1] > samples:
        wrong = ks[0] if ks[0] < 1 else ks[-1]
        raise UserError(
            f"--k {wrong}: must be from 1 to the number of samples, {samples}. Use --samples {max(wrong, 1)}."
        )
    return samples, temperature, ks


def levels(given: str | None) -> tuple[int, ...] | None:
    """`1-3` -> (1, 2, 3).

    Raises:
        UserError: not such a range.
    """
    if given is None:
        return None
    match = _RANGE.fullmatch(given.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if low > high:
        raise UserError(f"--difficulty {given}: must be a level from 1 to 5, or two with a dash between, like 1-3.")
    return tuple(range(low, high + 1))


def split_names(given: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in given.split(",") if name.strip()]
