"""Science: unit conversions and school formulas with whole or short decimal answers."""

from __future__ import annotations

from fractions import Fraction
from random import Random

from ray_pipeline.evaluation.tasks.item import Problem

# (larger unit, smaller unit, how many of the smaller make one larger), by level.
UNITS: tuple[tuple[tuple[str, str, int], ...], ...] = (
    (("metres", "centimetres", 100), ("minutes", "seconds", 60), ("hours", "minutes", 60)),
    (("kilometres", "metres", 1000), ("kilograms", "grams", 1000), ("litres", "millilitres", 1000)),
    (("days", "minutes", 1440), ("hours", "seconds", 3600), ("weeks", "hours", 168)),
    (("square metres", "square centimetres", 10_000), ("tonnes", "grams", 1_000_000)),
    (("cubic metres", "cubic centimetres", 1_000_000), ("square kilometres", "square metres", 1_000_000)),
)


def decimal(value: Fraction) -> str:
    """A terminating fraction as a decimal number."""
    digits = next(d for d in range(12) if (value * 10**d).denominator == 1)
    text = f"{abs(value.numerator) * 10**digits // value.denominator:0{digits + 1}d}"
    whole = text if digits == 0 else f"{text[:-digits]}.{text[-digits:]}"
    return f"-{whole}" if value < 0 else whole


def conversion(rng: Random, level: int) -> Problem:
    """From a unit to another, either way."""
    large, small, factor = rng.choice(UNITS[level - 1])
    count = rng.randint(2, 20 * level)
    if rng.random() < 0.5:
        return Problem(f"How many {small} are {count} {large}?", str(count * factor))
    return Problem(f"How many {large} are {count * factor} {small}?", str(count))


def temperature(rng: Random, level: int) -> Problem:
    """Celsius, Fahrenheit and kelvin."""
    celsius = 5 * rng.randint(0 if level <= 2 else -20, 20 * level)
    if level == 1:
        return Problem(f"What are {celsius} degrees Celsius in kelvin? Take 273 for absolute zero.", str(celsius + 273))
    fahrenheit = celsius * 9 // 5 + 32
    if level <= 3:
        return Problem(f"What are {celsius} degrees Celsius in degrees Fahrenheit?", str(fahrenheit))
    return Problem(f"What are {fahrenheit} degrees Fahrenheit in degrees Celsius?", str(celsius))


def motion(rng: Random, level: int) -> Problem:
    """Distance, time and speed; then acceleration and energy."""
    speed, time = rng.randint(2, 20 * level), rng.randint(2, 12)
    if level == 1:
        return Problem(f"A cart goes {speed} m/s for {time} s. How many metres is that?", str(speed * time))
    if level == 2:
        return Problem(f"A train goes {speed * time} km in {time} h. What is its speed in km/h?", str(speed))
    if level == 3:
        return Problem(f"What are {speed} m/s in km/h?", decimal(Fraction(speed * 18, 5)))
    if level == 4:
        a = rng.randint(2, 9)
        start = rng.randint(1, 20)
        text = f"A car at {start} m/s speeds up by {a} m/s² for {time} s. What is its speed in m/s?"
        return Problem(text, str(start + a * time))
    mass, v = 2 * rng.randint(1, 20), rng.randint(2, 20)
    return Problem(f"What is the kinetic energy in joules of {mass} kg at {v} m/s?", str(mass * v * v // 2))


def formula(rng: Random, level: int) -> Problem:
    """Force, density, current, power, the lever."""
    a, b = rng.randint(2, 9 * level), rng.randint(2, 9)
    if level == 1:
        return Problem(f"What force in newtons gives {b} kg an acceleration of {a} m/s²?", str(a * b))
    if level == 2:
        return Problem(f"{a * b} g fill {b} cm³. What is the density in g/cm³?", str(a))
    if level == 3:
        return Problem(f"What current in amperes flows through {b} ohms at {a * b} volts?", str(a))
    if level == 4:
        return Problem(f"What power in watts do {b} ohms take up at a current of {a} amperes?", str(a * a * b))
    c = rng.randint(2, 9)
    text = f"{a * b} N pull {c} m from a lever's pivot. At how many metres do {a} N balance them?"
    return Problem(text, str(b * c))
