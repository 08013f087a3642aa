"""Rewards by name: built in, registered by a decorator or an entry point, "module:function", "reasoning_gym:task"."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.isolation.function_name import address, entry_points, import_function

Reward = Callable[[str, str, str], float]

ENTRY_POINTS = "ray_pipeline.rewards"
GYM = "reasoning_gym"
# Modules whose import registers the built-in rewards.
_BUILTIN = ("answer", "math_answer", "exact", "think_format", "length", "repetition", "unit_tests", "tool_use")


@dataclass(frozen=True)
class RewardEntry:
    """A reward and what may be expected of it.

    Attributes:
        function: `(prompt, completion, reference) -> float`, after the `leading` arguments.
        isolated: it may hang, crash or raise, so a process of its own calls it; False only for functions that cannot.
        judges: a right answer scores 1 and a wrong one 0, which the self-test before training checks.
        full: what a well-formed right answer scores; None where that depends.
        demonstrate: an answer that shows the reference, None where it cannot be written from it.
        where: "module:function", if the function was named so.
    """

    name: str
    function: Callable[..., float]
    isolated: bool = True
    judges: bool = False
    full: float | None = None
    demonstrate: Callable[[str], str | None] | None = None
    leading: tuple[str, ...] = ()
    where: str | None = None

    def __call__(self, prompt: str, completion: str, reference: str) -> float:
        return float(self.function(*self.leading, prompt, completion, reference))

    @property
    def address(self) -> str:
        """Where another process finds the function, "module:function"."""
        return self.where or address(self.function, "reward")


_ENTRIES: dict[str, RewardEntry] = {}


def reward(
    name: str,
    *,
    isolated: bool = True,
    judges: bool = False,
    full: float | None = None,
    demonstrate: Callable[[str], str | None] | None = None,
) -> Callable[[Reward], Reward]:
    """Register a function under a name for `grpo.rewards`.

        @reward("shouts")
        def shouts(prompt: str, completion: str, reference: str) -> float:
            return float(completion.isupper())

    A package brings rewards by an entry point in the group "ray_pipeline.rewards" that names such a function. A
    function that takes a keyword `timeout_seconds` is given the time it has, one that takes `without_landlock` is told
    whether programs may run where the kernel has none; `prepare_process()` of its module is called once in each
    process, before any clock runs.

    Args:
        isolated, judges, full, demonstrate: as in `RewardEntry`.
    """

    def register(function: Reward) -> Reward:
        whole = 1.0 if judges else full
        _ENTRIES[name] = RewardEntry(name, function, isolated, judges, whole, demonstrate)
        return function

    return register


@functools.cache
def _load() -> None:
    """Import everything that registers rewards, once."""
    for module in _BUILTIN:
        importlib.import_module(f"ray_pipeline.rewards.{module}")
    for name, found in entry_points(ENTRY_POINTS):
        if callable(found) and name not in _ENTRIES:
            _ENTRIES[name] = RewardEntry(name, found)


def known_rewards() -> dict[str, RewardEntry]:
    """All registered rewards by name, in alphabetical order."""
    _load()
    return dict(sorted(_ENTRIES.items()))


def get_reward(name: str) -> RewardEntry:
    """The reward of that name, to be called with (prompt, completion, reference).

    Raises:
        UserError: naming the rewards there are; or that a module, a function or a task is not found.
    """
    entries = known_rewards()
    if name in entries:
        return entries[name]
    module, colon, rest = name.partition(":")
    if colon and module == GYM:
        from ray_pipeline.data.tasks.reasoning_gym_source import check_task
        from ray_pipeline.rewards import gym

        check_task(rest)
        # A task may give something for a wrong answer, so it is not one that "judges".
        return RewardEntry(name, gym.gym_score, full=1.0, demonstrate=gym.oracle, leading=(rest,))
    if colon:
        return RewardEntry(name, import_function(name, "reward"), where=name)
    raise UserError(
        f"reward {name!r} is not known{did_you_mean(name, entries)}. Known: {', '.join(entries)}, "
        f'"{GYM}:task", and functions of your own as "module:function".'
    )


def check_reward_names(weights: Mapping[str, float], *, without_landlock: bool = False) -> None:
    """Raise UserError unless every reward of a config can be had here. Cheap: no torch, no Ray.

    A module of the user's is imported; the sandbox is tried where a reward needs it.
    """
    if not weights:
        raise UserError('grpo.rewards is empty: nothing would be learnt. Name a reward, for example {"answer": 1.0}.')
    for name in weights:
        entry = get_reward(name)
        if entry.isolated:
            _ = entry.address
    if not any(weights.values()):
        raise UserError(f"grpo.rewards={dict(weights)}: every weight is 0, so nothing would be learnt.")
    if "code" in weights:
        from ray_pipeline.isolation.sandbox import check_sandbox

        check_sandbox(without_landlock=without_landlock)
    if "math" in weights:
        from ray_pipeline.rewards.math_answer import check_installed

        check_installed()
