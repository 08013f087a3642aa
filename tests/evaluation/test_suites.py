"""The built-in suites' answers are right: programs are run, equations solved and worlds tried again, independently."""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import re
from collections import Counter

import pytest

from ray_pipeline.evaluation.marking import are_right
from ray_pipeline.evaluation.tasks import Item, Request, make_task
from ray_pipeline.evaluation.tasks.suites import SUITES

SEEDS = range(3)


def items_of(suite: str, category: str | None = None, seeds: range = SEEDS) -> list[Item]:
    made = [item for seed in seeds for item in make_task(suite, Request(seed=seed)).items]
    return [item for item in made if category in (None, item.category)]


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_is_a_function_of_its_seed_and_a_shorter_one_is_its_beginning(suite: str) -> None:
    items = make_task(suite, Request(seed=4)).items
    assert items == make_task(suite, Request(seed=4)).items
    assert make_task(suite, Request(seed=4, limit=23)).items == items[:23]
    assert items != make_task(suite, Request(seed=5)).items
    assert len({item.prompt for item in items}) == len({item.id for item in items}) == len(items) == 200


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_every_category_and_level_alike(suite: str) -> None:
    items = make_task(suite, Request()).items
    categories, levels = Counter(i.category for i in items), Counter(i.difficulty for i in items)
    assert set(categories) == set(SUITES[suite][1]) and set(levels) == {1, 2, 3, 4, 5}
    assert max(levels.values()) - min(levels.values()) <= 20  # small levels run out of new questions
    assert {i.difficulty for i in make_task(suite, Request(difficulties=(2, 3), limit=40)).items} == {2, 3}


@pytest.mark.parametrize("suite", SUITES)
def test_the_reference_is_marked_right_and_another_answer_wrong(suite: str) -> None:
    items = list(items_of(suite, seeds=range(1)))
    others = ["no" if item.reference == "yes" else f"{item.reference}7" for item in items]
    for said, right in (([item.reference for item in items], True), (others, False)):
        texts = [f"<think>so</think>{text}" for text in said]
        marks = are_right([(item.prompt, text, item.reference) for item, text in zip(items, texts, strict=True)])
        assert marks == [right] * len(items)


def test_programs_print_their_answers() -> None:
    for item in items_of("programming"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(item.prompt.partition("\n")[2], {})
        assert printed.getvalue().strip() == item.reference, item.prompt


def test_exercises_are_solved_by_their_solutions_alone() -> None:
    for item in items_of("programming_functions", seeds=range(1)):
        space: dict[str, object] = {}
        exec(f"{item.reference}\n{item.data['tests']}", space)
        broken = item.reference.replace("return", "return None and")
        with pytest.raises(AssertionError):
            exec(f"{broken}\n{item.data['tests']}", {})


def whole(text: str) -> str:
    """A term as Python computes it: 3x -> 3*x, x^2 -> x**2."""
    return re.sub(r"(?<=[0-9a-z)])(?=[xy(])", "*", text.replace("^", "**"))


def test_substitutions_are_computed() -> None:
    for item in items_of("algebra", "substitution"):
        given, term = re.fullmatch(r"If (.*), what is (.*)\?", item.prompt).groups()
        values = {name: int(value) for name, value in re.findall(r"([xy])=(\d+)", given)}
        assert str(eval(whole(term), {}, values)) == item.reference


def test_systems_and_quadratics_are_solved() -> None:
    sympy = pytest.importorskip("sympy")
    x, y = sympy.symbols("x y")
    for item in items_of("algebra", "system", range(1)):
        first, second, name = re.fullmatch(r"(.*) and (.*)\. What is ([xy])\?", item.prompt).groups()
        sides = [whole(equation).split("=") for equation in (first, second)]
        [solution] = sympy.solve([sympy.sympify(a) - sympy.sympify(b) for a, b in sides], [x, y], dict=True)
        assert str(solution[{"x": x, "y": y}[name]]) == item.reference
    for item in items_of("algebra", "quadratic", range(1)):
        left, right = whole(re.search(r"of (.*)\?", item.prompt)[1]).split("=")
        assert str(max(sympy.solve(sympy.sympify(left) - sympy.sympify(right), x))) == item.reference


def test_exponents_hold_for_a_number() -> None:
    for item in items_of("algebra", "exponents"):
        assert eval(whole(item.prompt.partition(" is ")[0]), {}, {"x": 2}) == 2 ** int(item.reference)


def test_formulas_have_their_truth_value() -> None:
    for item in items_of("logic", "truth"):
        given, formula = re.fullmatch(r"(.*)\. Is this true: (.*)\? Answer yes or no\.", item.prompt).groups()
        values = {k: v == "true" for k, v in re.findall(r"(\w) is (true|false)", given)}
        assert eval(formula, {}, values) is (item.reference == "yes")


def test_inclusions_follow_from_their_premises() -> None:
    for item in items_of("logic", "inclusion"):
        start, end = re.search(r"that all (\w+) are (\w+)\?", item.prompt).groups()
        known = set(re.findall(r"All (\w+) are (\w+)\.", item.prompt))
        reached = {start}
        while more := {b for a, b in known if a in reached} - reached:
            reached |= more
        assert (end in reached) is (item.reference == "yes")


def test_rankings_have_one_order() -> None:
    for item in items_of("logic", "ranking"):
        pairs = re.findall(r"(\w+) is taller than (\w+)\.", item.prompt)
        pairs += [(b, a) for a, b in re.findall(r"(\w+) is shorter than (\w+)\.", item.prompt)]
        shorter_than = {name: {b for a, b in pairs if a == name} for pair in pairs for name in pair}
        for _ in shorter_than:  # transitive closure
            shorter_than = {n: s | {c for b in s for c in shorter_than[b]} for n, s in shorter_than.items()}
        order = sorted(shorter_than, key=lambda name: -len(shorter_than[name]))
        place = re.search(r"Who is the (.*)\?", item.prompt)[1]
        assert order[{"tallest": 0, "second tallest": 1, "shortest": -1}[place]] == item.reference


def test_knights_are_the_same_in_every_possible_world() -> None:
    for item in items_of("logic", "knights"):
        said = re.findall(r'(\w+) says: "(.*?)\."', item.prompt)
        people = [name for name, _ in said]
        asked = re.search(r"Is (\w+) a knight\?", item.prompt)[1]
        answers = set()
        for kinds in itertools.product((True, False), repeat=len(people)):
            world = dict(zip(people, kinds, strict=True))
            if all(claimed(who, text, world) == world[who] for who, text in said):
                answers.add("yes" if world[asked] else "no")
        assert answers == {item.reference}


def claimed(who: str, text: str, world: dict[str, bool]) -> bool:
    other = next(name for name in re.findall(r"[A-Z][a-z]+", text) if name in world)
    if "same kind" in text:
        return world[who] == world[other]
    if "at least one" in text:
        return not (world[who] and world[other])
    return world[other] == text.endswith("knight")


def test_conversions_and_temperatures() -> None:
    metres = {"metres": 1, "centimetres": 0.01, "kilometres": 1000, "square metres": 1, "square centimetres": 1e-4,
              "square kilometres": 1e6, "cubic metres": 1, "cubic centimetres": 1e-6}  # fmt: skip
    other = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800, "grams": 1, "kilograms": 1000,
             "tonnes": 1e6, "litres": 1, "millilitres": 0.001}  # fmt: skip
    units = metres | other
    for item in items_of("science", "conversion"):
        wanted, count, given = re.fullmatch(r"How many (.*) are (\d+) (.*)\?", item.prompt).groups()
        assert int(count) * units[given] / units[wanted] == pytest.approx(int(item.reference))
    for item in items_of("science", "temperature"):
        value = int(re.search(r"-?\d+", item.prompt)[0])
        to = item.prompt.split(" in ")[1]
        expected = value + 273 if "kelvin" in to else (value - 32) / 1.8 if "Celsius" in to else value * 1.8 + 32
        assert expected == pytest.approx(int(item.reference))


def test_sets_and_the_calendar() -> None:
    for item in items_of("reasoning", "sets"):
        sets = [{int(n) for n in group.split(", ")} for group in re.findall(r"\{(.*?)\}", item.prompt)]
        if sets:
            found = {"both": len(sets[0] & sets[1]), "together": len(sets[0] | sets[1]), "not": sum(sets[0] - sets[1])}
            assert str(next(v for k, v in found.items() if k in item.prompt)) == item.reference
        else:
            total, chess, football, neither = map(int, re.findall(r"\d+", item.prompt))
            assert chess + football + neither - total == int(item.reference)
    monday = datetime.date(2024, 1, 1)
    for item in items_of("reasoning", "calendar"):
        if match := re.match(r"Today is (\w+)\. .* (?:in )?(\d+) days( ago)?", item.prompt):
            today = next(day for i in range(7) if f"{(day := monday + datetime.timedelta(i)):%A}" == match[1])
            assert f"{today + datetime.timedelta(int(match[2]) * (-1 if match[3] else 1)):%A}" == item.reference
        else:
            named = re.findall(r"[A-Z]\w+ \d+", item.prompt)
            dates = [datetime.datetime.strptime(f"2023 {name}", "%Y %B %d") for name in named]
            days = (dates[1] - dates[0]).days
            start = re.search(r"is a (\w+)\.", item.prompt)
            names = [f"{monday + datetime.timedelta(i):%A}" for i in range(7)]
            assert item.reference == (str(days) if start is None else names[(names.index(start[1]) + days) % 7])


def test_cups_are_followed() -> None:
    for item in items_of("reasoning", "tracking"):
        ball = re.search(r"under cup (\w)\.", item.prompt)[1]
        for a, b in re.findall(r"(\w) and (\w)(?:;|\.)", item.prompt):
            ball = b if ball == a else a if ball == b else ball
        assert ball == item.reference
