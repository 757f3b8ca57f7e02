"""Options from dataclasses: their help texts, and subsets of their fields as groups."""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deformnet._errors import UserError

if TYPE_CHECKING:
    from deformnet.data.location import Location

RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
DirPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
GROUP = tyro.conf.arg(prefix_name=False)
"""Marks a parameter whose fields form a group of options."""


def location(
    root: Path | None, images: Path | None, annotations: Path | None, name: str, prefix: str = ""
) -> "Location":
    """Location of a data set: one folder (the option or argument `name`), or two places.

    Raises:
        UserError: unless exactly the folder or exactly both places are given.
    """
    from deformnet.data.location import DataFiles

    if root is not None and images is None and annotations is None:
        return root
    if root is None and images is not None and annotations is not None:
        return DataFiles(images, annotations)
    either = f"{name}, or both " if name else "both "
    raise UserError(f"expected {either}--{prefix}images and --{prefix}annotations")


def options(name: str, defaults: Any, fields: Container[str], base: type | None = None) -> type:
    """Returns a dataclass with some fields of another one, as a group of options.

    Args:
        name: of the class.
        defaults: instance of the other dataclass, whose values are the defaults.
        fields: names of the fields.
        base: dataclass with additional fields, which come first.
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
    """Adapts a command to tyro: joins the lines of help texts, and checks groups in the call.

    tyro keeps the line breaks of docstrings, and prints errors of a group's `__post_init__` in its
    own box instead of raising them.
    """
    groups, parameters = {}, []
    for parameter in inspect.signature(command).parameters.values():
        group = typing.get_args(parameter.annotation)[:1] or (parameter.annotation,)
        if isinstance(group[0], type) and dataclasses.is_dataclass(group[0]):
            groups[parameter.name] = group[0]
            fields = [(f.name, hint, _default(f)) for f, hint in _documented_fields(group[0])]
            # Fields only: the title replaces the docstring, and the call runs the checks.
            plain = dataclasses.make_dataclass(group[0].__name__, fields, kw_only=True)
            plain.__doc__ = ""
            parameter = parameter.replace(annotation=Annotated[plain, GROUP])
            if parameter.default is not parameter.empty:
                parameter = parameter.replace(default=plain(**vars(parameter.default)))
        parameters.append(parameter)

    def run(**arguments: Any) -> None:
        command(**{k: groups[k](**vars(v)) if k in groups else v for k, v in arguments.items()})

    run.__name__ = command.__name__
    # In the Args section, continuation lines are indented further than the first line.
    run.__doc__ = re.sub(r"\n {8,}(?=\S)(?!\w+: )", " ", command.__doc__ or "")
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _documented_fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass, with help texts in their type annotations."""
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
    """The docstring of each field of a dataclass; Python does not keep them."""
    docstrings = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base) or base.__module__ == "types":
            continue
        body = _class_definitions(base.__module__)[base.__name__].body
        for statement, below in itertools.pairwise(body):
            match statement, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docstrings[name] = " ".join(text.split())
    return docstrings


@functools.cache
def _class_definitions(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module by name; `inspect.getsource` would parse it again for each."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
