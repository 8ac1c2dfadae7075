"""Rooms that share their name with the function that they are for: ``graphprune.trace(model, …)``."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, module: str, function: str) -> None:
    """Let a package be called like the function that it is named after.

    Importing ``graphprune.trace.fx`` binds ``graphprune.trace`` to the package, and would hide a function of that
    name; so calling the package calls the function, which is imported on first use.

    Args:
        package: Qualified name of a package that is being imported.
        module: Where the function is.
        function: Its name.
    """

    class CallablePackage(ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*arguments, **options)

    sys.modules[package].__class__ = CallablePackage
