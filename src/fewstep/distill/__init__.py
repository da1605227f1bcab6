"""Distillation: the methods that make a few-step student of a teacher."""

from fewstep.callable_module import make_callable

make_callable(__name__)
