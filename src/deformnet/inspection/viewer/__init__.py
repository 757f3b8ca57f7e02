"""A local web page on which a network shows where it looks. Gradio is needed by `page` alone."""
