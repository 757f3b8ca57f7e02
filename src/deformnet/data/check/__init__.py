"""Is a data set on disk what it should be: the official sets, and a check of any set's files."""

from deformnet.data.check.check import DataReport, check_data
from deformnet.data.check.official import OFFICIAL_SETS, OfficialSet, where_text

__all__ = ["OFFICIAL_SETS", "DataReport", "OfficialSet", "check_data", "where_text"]
