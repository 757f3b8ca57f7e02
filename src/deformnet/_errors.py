"""Errors caused by the user, as opposed to bugs in this package."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in the data, files, options or settings that a user passed in.

    The command line prints the message as one line. Any other ValueError, TypeError or RuntimeError
    is a bug in this package and keeps its traceback.
    """


@contextmanager
def users_values() -> Iterator[None]:
    """Turns ValueError into `UserError` where values that a user passed meet our own checks."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def require_at_least(settings: object, least: int, *names: str) -> None:
    """Raises UserError for attributes below a bound; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"expected {name} to be at least {least}, but got {value}")


def require_at_most(settings: object, most: float, *names: str) -> None:
    """Raises UserError if an attribute, or a number in a tuple, exceeds a bound; None passes.

    The bounds catch typos and broken scripts, which would otherwise exhaust time or memory.
    """
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(number > most for number in numbers):
            raise UserError(f"expected {name} to be at most {most:g}, but got {value}")


TOO_LARGE = "too large for the memory of this machine"
"""Part of messages about a single file or image that exhausts the memory."""

_NO_MEMORY = re.compile(
    "out of memory|allocate memory|STATUS_ALLOC_FAILED"  # the last: cuDNN and cuBLAS
    # oneDNN, where a primitive descriptor is one that it does not implement; and C++ in general.
    "|could not create a primitive(?! descriptor)|bad_alloc"
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


class MissingExtraError(ImportError):
    """A part of deformnet was used whose optional dependencies are not installed."""


def require_extra(part: str, extra: str, *modules: str) -> None:
    """Refuses to import a part whose optional dependencies are missing.

    Args:
        part: name of the part, such as "deformnet.models".
        extra: the extra of the package that installs the modules.
        modules: names of the top-level modules that the part needs.

    Raises:
        MissingExtraError: if a module is not installed; the message says how to install it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                f"{part} needs {module}, which is not installed: pip install 'deformnet[{extra}]'",
                name=module,
            )
