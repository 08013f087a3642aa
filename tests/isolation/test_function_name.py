"""Functions by name: found, or refused with what is there."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.isolation.function_name import address, entry_points, import_function
from tests.isolation import made


def test_a_function_is_found_by_its_name_and_named_by_its_place():
    assert import_function("tests.isolation.made:double", "reward") is made.double
    assert address(made.double, "reward") == "tests.isolation.made:double"


def test_a_module_in_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "lies_here_only.py").write_text("def f():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_function("lies_here_only:f", "reward")() == 7


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("double", "write module:function, for example my_rewards:reward"),
        (":double", "write module:function"),
        ("tests.isolation.made:", "write module:function"),
        ("no_such_module:f", r"importing no_such_module failed \(ModuleNotFoundError.*Run from the folder"),
        ("tests.isolation.broken:f", r"failed \(RuntimeError: half done\)"),
        ("tests.isolation.made:duble", r'has no function "duble" \(did you mean "double"\?\)'),
        ("tests.isolation.made:os", 'has no function "os"'),
    ],
)
def test_what_is_not_there_is_refused_with_the_reason(name, said):
    with pytest.raises(UserError, match=rf'reward "{name}": .*{said}'):
        import_function(name, "reward")


def test_a_function_that_no_other_process_could_find_is_refused():
    def local():
        return None

    for function in (local, lambda: None, print.__call__):
        with pytest.raises(UserError, match="must be a function at the top of a module"):
            address(function, "reward")


def test_a_broken_entry_point_names_its_package(monkeypatch):
    bad = EntryPoint("mine", "no_such_package:f", "ray_pipeline.rewards")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [bad])
    with pytest.raises(UserError, match=r'the entry point "mine" of ray_pipeline.rewards \(no_such_package:f\)'):
        list(entry_points("ray_pipeline.rewards"))
    good = EntryPoint("mine", "tests.isolation.made:double", "ray_pipeline.rewards")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [good])
    assert list(entry_points("ray_pipeline.rewards")) == [("mine", made.double)]
