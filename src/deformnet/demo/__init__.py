"""The whole story on made images: `deformnet demo`."""
