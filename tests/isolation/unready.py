"""A module that can be imported but not prepared."""


def prepare_process():
    raise OSError("no disk")


def f():
    return 1
