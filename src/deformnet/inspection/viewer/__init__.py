"""An interactive page that shows sampling locations: `deformnet inspect view`. Needs Gradio."""
