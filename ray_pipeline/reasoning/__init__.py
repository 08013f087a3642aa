"""What a model thinks and what it answers, from its text: as a stream (`ThinkStream`) and as data (`parse`)."""

from ray_pipeline.reasoning.parsed import Reasoned, parse
from ray_pipeline.reasoning.stream import CLOSE, OPEN, Event, State, ThinkStream

__all__ = ["CLOSE", "OPEN", "Event", "Reasoned", "State", "ThinkStream", "parse"]
