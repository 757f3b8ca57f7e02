"""The cost of deformable networks beside their plain twins: Table 4, and a step of training."""
