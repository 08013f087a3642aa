"""What people say to a model besides its questions, and what it says to that: greetings, and that it was trained for
little. Each exchange is a pure function of the random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

ABILITIES = "sums, equations, comparisons and word problems"
HELLO = f"Hello! Ask me for {ABILITIES}."
THANKS = "You are welcome."
BYE = "Goodbye!"
WELL = "I am well. What shall I work out?"
WHO = f"I am a small model. I was trained for {ABILITIES}."
OUTSIDE = f"I was trained for {ABILITIES}, not for that. Ask me: What is 47+38?"

_SAID: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello", "hi", "hey", "good morning", "good evening", "good day", "hello there", "hi there", "greetings"), HELLO),
    (("thanks", "thank you", "thank you very much", "many thanks", "thanks a lot", "that is right, thanks"), THANKS),
    (("bye", "goodbye", "see you", "good night", "bye bye", "that was all, bye"), BYE),
    (("how are you", "how do you do", "are you well", "how is it going", "what is up"), WELL),
    (
        ("who are you", "what are you", "what can you do", "help", "what do you know", "what can I ask you",
         "what were you trained for", "are you a robot", "what is your name", "tell me about yourself"),
        WHO,
    ),
)  # fmt: skip
_ENDS = ("", "?", "!", ".")
_FRAMES = (
    "Tell me about {}.", "What do you know about {}?", "Write a poem about {}.", "Write a story about {}.",
    "What is {}?", "Explain {} to me.", "Why do people like {}?", "Do you like {}?", "Who invented {}?",
    "Where can I find {}?", "How do I learn about {}?", "Give me a summary of {}.", "What do you think of {}?",
    "When did {} begin?", "Translate {} into French.", "Can you help me with {}?", "What is the history of {}?",
    "Make a list of facts about {}.", "Sing a song about {}.", "Is {} important?",
)  # fmt: skip
_TOPICS = (
    "the moon", "music", "football", "the weather", "Paris", "history", "cats", "dogs", "cooking", "the sea",
    "politics", "love", "computers", "the law", "medicine", "Shakespeare", "Africa", "trains", "the sun", "birds",
    "chess", "painting", "bread", "winter", "rivers", "kings and queens", "space", "dinosaurs", "coffee", "mountains",
    "the news", "gardens", "films", "my homework", "the stock market", "Japan", "sleep", "dreams", "wine", "volcanoes",
)  # fmt: skip
# Kept out of training: whether the model says what it does not know of topics that it has never met.
_UNSEEN = ("the stars", "tennis", "London", "tea", "horses", "the theatre", "China", "snow", "poetry", "the desert")
OUTSIDE_SHARE = 0.6  # of the exchanges


class Exchange(NamedTuple):
    """What is said, and the answer to it."""

    prompt: str
    answer: str


def exchange(rng: Random) -> Exchange:
    """A greeting and the like, or a question of something else than the model was trained for."""
    if rng.random() < OUTSIDE_SHARE:
        return Exchange(_outside(rng, _TOPICS), OUTSIDE)
    said, answer = rng.choice(_SAID)
    text = rng.choice(said)
    return Exchange((text.capitalize() if rng.random() < 0.5 else text) + rng.choice(_ENDS), answer)


def unseen_questions(count: int, seed: int) -> list[Exchange]:
    """Different questions about topics that no `exchange` is about."""
    rng = Random(f"{seed}/unseen")
    found: dict[str, None] = {}
    while len(found) < min(count, len(_FRAMES) * len(_UNSEEN)):
        found[_outside(rng, _UNSEEN)] = None
    return [Exchange(prompt, OUTSIDE) for prompt in found]


def _outside(rng: Random, topics: Sequence[str]) -> str:
    return rng.choice(_FRAMES).format(rng.choice(topics))
