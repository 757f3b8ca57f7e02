"""The rows of the paper's tables, and running them."""
