"""Options from dataclasses: their help texts, and subsets of their fields as groups."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Callable, Container
from typing import Annotated, Any

import tyro

GROUP = tyro.conf.arg(prefix_name=False)
"""Marks a parameter whose fields are a group of options."""


def options(name: str, defaults: Any, fields: Container[str], base: type | None = None) -> type:
    """A dataclass with some fields of another one, as a group of options.

    Args:
        name: of the class.
        defaults: instance of the other dataclass, whose values are the defaults.
        fields: names of the fields.
        base: dataclass with further fields, which come first.
    """
    chosen = [
        (field.name, hint, dataclasses.field(default=getattr(defaults, field.name)))
        for field, hint in _documented_fields(type(defaults))
        if field.name in fields
    ]
    return dataclasses.make_dataclass(
        name, chosen, bases=() if base is None else (base,), frozen=True, kw_only=True
    )


def rewrap(command: Callable[..., None]) -> Callable[..., None]:
    """Joins the lines of a command's help texts, so that tyro wraps them to the terminal."""
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        group = typing.get_args(parameter.annotation)[:1] or (parameter.annotation,)
        if dataclasses.is_dataclass(group[0]) and isinstance(group[0], type):
            joined = _with_joined_help(group[0])
            command.__annotations__[parameter.name] = Annotated[joined, GROUP]
            if parameter.default is not parameter.empty:
                parameter = parameter.replace(default=joined(**vars(parameter.default)))
        parameters.append(parameter)
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    # In the section Args, lines that continue a text are indented further than its first line.
    command.__doc__ = re.sub(r"\n {8,}(?=\S)(?!\w+: )", " ", command.__doc__ or "")
    return command


def _with_joined_help(group: type) -> type:
    fields = [(f.name, hint, _default(f)) for f, hint in _documented_fields(group)]
    joined = dataclasses.make_dataclass(
        group.__name__, fields, bases=(group,), frozen=True, kw_only=True
    )
    joined.__doc__ = ""  # the group's title says it
    return joined


def _documented_fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass, with types that carry the help text."""
    hints, help_texts = typing.get_type_hints(cls, include_extras=True), _docstrings(cls)
    documented = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if field.name in help_texts:
            hint = Annotated[hint, tyro.conf.arg(help=help_texts[field.name])]
        documented.append((field, hint))
    return documented


def _default(field: dataclasses.Field[Any]) -> Any:
    return dataclasses.field(default=field.default, default_factory=field.default_factory)


def _docstrings(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, which the class itself does not keep."""
    docstrings = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base) or base.__module__ == "types":
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, below in itertools.pairwise(definition.body):
            match statement, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docstrings[name] = " ".join(text.split())
    return docstrings
