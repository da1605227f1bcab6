"""Evaluation: what a model can do, in figures and pictures."""

from fewstep.callable_module import make_callable

make_callable(__name__)
