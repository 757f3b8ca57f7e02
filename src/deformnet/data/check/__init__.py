"""Check of data sets on disk, and the table of official data sets."""

from deformnet.data.check.check import DataReport, check_data
from deformnet.data.check.official import OFFICIAL_SETS, OfficialSet, where_text

__all__ = ["OFFICIAL_SETS", "DataReport", "OfficialSet", "check_data", "where_text"]
