"""Tests and the program they try run in two processes: every honest program passes as in one, and no other does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ray_pipeline.isolation.sandbox import run_judged

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

VECTOR = """
class Vector:
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __add__(self, other):
        return Vector(self.x + other.x, self.y + other.y)
    def __eq__(self, other):
        return isinstance(other, Vector) and (self.x, self.y) == (other.x, other.y)
    def __hash__(self):
        return hash((self.x, self.y))
    def __lt__(self, other):
        return self.x < other.x
    def __len__(self):
        return 2
    def __getitem__(self, i):
        return (self.x, self.y)[i]
    def __repr__(self):
        return f"Vector({self.x}, {self.y})"
"""
HONEST = {
    "values of every kind": (
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "def f(k):\n    return [1, 2.5, 'é\\ud800', None, True, (1, (2,)), {1, 2}, frozenset([3]), {(1, 2): [3]},"
        " b'\\x00', 3+4j, Fraction(1, 3), Decimal('1.50'), range(3), 2**20000, float('inf'), [], bytearray(b'a')][k]",
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "wanted = [1, 2.5, 'é\\ud800', None, True, (1, (2,)), {1, 2}, frozenset([3]), {(1, 2): [3]},"
        " b'\\x00', 3+4j, Fraction(1, 3), Decimal('1.50'), range(3), 2**20000, float('inf'), [], bytearray(b'a')]\n"
        "for k, value in enumerate(wanted):\n"
        "    assert f(k) == value and type(f(k)) is type(value), k\nassert f(k=2) == wanted[2]",
    ),
    "arguments changed in place": (
        "def f(a, b):\n    a.sort()\n    b['n'] = a[0]\n    return a",
        "a, b = [3, 1], {}\nassert f(a, b) is a\nassert a == [1, 3] and b == {'n': 1}",
    ),
    "exceptions, built in and its own": (
        "class Broken(KeyError):\n    pass\ndef f(n):\n    if n:\n        raise ValueError(f'bad {n}')\n"
        "    raise Broken('x')",
        "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'bad 1'\n"
        "try:\n    f(0)\n    assert False\nexcept Broken:\n    pass\n"
        "try:\n    f(0)\n    assert False\nexcept KeyError as e:\n    assert e.args == ('x',)",
    ),
    "objects, operators, attributes": (
        VECTOR,
        "a = Vector(1, 2)\nassert a + Vector(3, 4) == Vector(4, 6) and a != Vector(0, 2) and a[1] == 2 and "
        "len(a) == 2\n"
        "assert repr(a) == 'Vector(1, 2)' and f'{a}' == 'Vector(1, 2)' and isinstance(a, Vector) and list(a) == "
        "[1, 2]\n"
        "a.x = 9\nassert a.x == 9 and not hasattr(a, 'z') and sorted([a, Vector(0, 0)])[0] == Vector(0, 0)\n"
        "assert len({a, Vector(9, 2)}) == 1 and Vector(5, 5) in [a, Vector(5, 5)]",
    ),
    "generators": (
        "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
        "import itertools\nassert list(itertools.islice(f(), 3)) == [0, 1, 2]\ng = f()\n"
        "assert next(g) == 0 and next(g) == 1",
    ),
    "functions handed over": (
        "def f(g, xs):\n    return [g(x) for x in xs]\ndef compose(a, b):\n    return lambda x: a(b(x))",
        "seen = []\ndef g(x):\n    seen.append(x)\n    return x * 2\nassert f(g, (1, 2)) == [2, 4] and seen == [1, 2]\n"
        "assert f(abs, [-1]) == [1] and compose(str, g)(2) == '4' and f(g, iter([3])) == [6]",
    ),
    "objects of the tests": (
        "def f(node):\n    total = 0\n    while node:\n        node.seen = True\n        total += node.value\n"
        "        node = node.next\n"
        "    return total",
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
        "head = Node(1, Node(2))\nassert f(head) == 3 and head.next.seen",
    ),
    "names the program imported": (
        "import math\nfrom collections import Counter\nPI = math.pi\ndef f(t):\n    return Counter(t)",
        "assert f('aab') == Counter('aab') == {'a': 2, 'b': 1} and math.isclose(PI, 3.14159, abs_tol=1e-4)",
    ),
    "an exercise named as a builtin": ("def sum(a, b):\n    return a * b", "assert sum(3, 4) == 12"),
    "what only some programs bring": (
        "import numpy as np\ndef f(x):\n    return np.array(x) * 2",
        "import numpy as np\nassert (f([1, 2]) == np.array([2, 4])).all()",
    ),
    "a check in a function": (
        "def candidate(a):\n    return a + 1",
        "def check(c):\n    assert c(1) == 2\n    assert all(c(i) == i + 1 for i in range(50))\ncheck(candidate)",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes_and_its_tests_can_fail(name):
    program, tests = HONEST[name]
    assert run_judged(program, tests, seconds=10)
    assert not run_judged(program, f"{tests}\nassert False", seconds=10)


# As long as a float holds exactly: five digits stood in an address of some object now and then.
SECRET = 681350274419863
CHECK = f"assert f(3) == {SECRET} and abs(f(4) - 67890.5) < 1e-6 and 11 in f(5) and all(f(i) == 777 for i in range(9))"
READS_ALL = """
import gc, sys, os
def seen():
    texts = []
    frame = sys._getframe()
    while frame:
        texts.append(repr(frame.f_locals) + repr(frame.f_code.co_consts))
        frame = frame.f_back
    texts += [repr(o) for o in gc.get_objects() if isinstance(o, (str, bytes, list, dict, tuple))][:200000]
    for path in ("/proc/self/mem", "/proc/self/environ", f"/proc/{os.getppid()}/mem", f"/proc/{os.getppid()}/environ"):
        try:
            texts.append(repr(open(path, "rb").read(1 << 20)))
        except OSError:
            pass
    return "".join(texts)
def f(x):
    text = seen()
    # Written backwards, so that it does not find its own text.
    return next((float(back[::-1]) for back in ("368914472053186", "5.09876") if back[::-1] in text), 0)
"""
CHEATS = {
    "an object equal to everything": "class A:\n    __eq__ = __lt__ = __contains__ = lambda *a: True\n"
    "    __sub__ = __rsub__ = __abs__ = lambda *a: A()\n    __iter__ = lambda s: iter([s])\n"
    "    __hash__ = lambda s: 1\n"
    "def f(x):\n    return A()",
    "a number that differs by nothing": "class A:\n    def __sub__(self, other):\n        return 0.0\n"
    "    __float__ = __abs__ = lambda s: 0.0\ndef f(x):\n    return A()",
    "builtins of its own": f"def all(x):\n    return True\ndef abs(x):\n    return 0\ndef f(x):\n    return {SECRET}",
    "StopIteration ends the tests' loops": "def f(x):\n    raise StopIteration",
    "leaving": "import os\ndef f(x):\n    os._exit(0)",
    "leaving at import": "import sys\nsys.exit(0)",
    "leaving from afar": "def f(x):\n    raise SystemExit(0)",
    "frames, objects and memory": READS_ALL,
    "printing for the tests": "import os\nfor i in range(64):\n    try:\n"
    "        os.write(i, b'all tests passed\\n' * 9)\n"
    "    except OSError:\n        pass\ndef f(x):\n    return 0",
    "answers of its own making": "import json, os\ndef f(x):\n    for i in range(3, 32):\n        try:\n"
    "            os.write(i, json.dumps({'value': True}).encode() + b'\\n')\n        except OSError:\n"
    "            pass\n"
    "    return True",
    "evaluating in the tests": "import json, os\n"
    "ask = {'ask': 'call', 'operands': {'list': [{'shared': ['builtins', 'eval']},"
    " '__call__', 'exec(\"import os; os._exit(0)\")']}, 'named': {'dict': []}}\ndef f(x):\n"
    "    for i in range(3, 32):\n        try:\n            os.write(i, json.dumps(ask).encode() + b'\\n')\n"
    "        except OSError:\n            pass\n    return 0",
    "something else's name": "class F:\n    __module__ = 'unittest.mock'\n    __name__ = 'ANY'\nf = F()",
    "atexit and threads": "import atexit, os, threading\natexit.register(os._exit, 0)\n"
    "threading.Thread(target=lambda: os._exit(0)).start()\ndef f(x):\n    return 0",
    "a flood": "def f(x):\n    return list(range(10**9))",
    "depth": "def f(x):\n    v = []\n    for i in range(10**5):\n        v = [v]\n    return v",
    "itself": "def f(x):\n    v = []\n    v.append(v)\n    return v",
    "hanging": "def f(x):\n    while True:\n        pass",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_program_passes_tests_that_it_does_not_answer(name):
    ends = name not in ("hanging", "a flood")
    assert not run_judged(CHEATS[name], CHECK, seconds=6 if ends else 2)
    if not ends:
        return  # it answers no check by itself either
    for check in CHECK.removeprefix("assert ").split(" and "):
        if name != "builtins of its own" or "f(3)" not in check:
            assert not run_judged(CHEATS[name], f"assert {check}", seconds=3), check


def test_the_program_that_reads_all_finds_what_stands_in_its_own_process():
    check = f"assert f(3) == {SECRET}"
    assert subprocess.run([sys.executable, "-c", f"{READS_ALL}\n{check}"], timeout=30).returncode == 0


def test_a_callback_gives_the_program_nothing_but_calls():
    tests = (
        "secret = 424242\nclass Box:\n    def __init__(self):\n        self._hidden = secret\n        self.open = 1\n"
    )
    tests += "def g(x):\n    return x\nassert f(g, Box(), (i for i in range(secret, secret + 1))) == secret"
    for reach in (
        "g.__globals__['secret']",
        "g.__call__.__self__.__globals__['secret']",
        "g._peer.ask('call', g, '__getattribute__', '__globals__')['secret']",
        "g._peer.ask('get', box, '_hidden')",
        "g._peer.ask('load', 'x')",
        "it.gi_frame.f_globals['secret']",
    ):
        assert not run_judged(f"def f(g, box, it):\n    return {reach}", tests, seconds=5), reach
    assert run_judged("def f(g, box, it):\n    return g(next(it)) * box.open", tests, seconds=5)
