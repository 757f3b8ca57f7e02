"""Code shared by the CPU kernels of several operators."""

from deformnet.ops.cpu.loading import instruction_set, select_instruction_set, why_unavailable

__all__ = ["instruction_set", "select_instruction_set", "why_unavailable"]
