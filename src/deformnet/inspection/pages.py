"""HTML from Jinja templates, in one style."""

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deformnet._files import write_file

_SHARED = Path(__file__).parent / "templates"


def render(template: Path, values: Mapping[str, object]) -> str:
    """Render a template, which may extend and include those of this package.

    Args:
        template: template file.
        values: variables of the template; text is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def write_page(path: Path, template: Path, values: Mapping[str, object]) -> None:
    """Render a template to a file."""
    write_file(path, render(template, values).encode())
