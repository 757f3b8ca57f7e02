"""An interactive page that shows sampling locations: `deformnet inspect view`. Needs Gradio."""

__all__: list[str] = []  # parts of the command line
