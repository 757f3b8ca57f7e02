"""What deformable networks have learned, seen from outside: for any model that holds the layers."""

from deformnet.analysis.sampling import SamplingLocations, sampling_locations

__all__ = ["SamplingLocations", "sampling_locations"]
