"""Check of data sets on disk, and the table of official data sets."""

from deformnet.data.check.check import check_data
from deformnet.data.check.official import OFFICIAL_SETS, OfficialSet, where_text
from deformnet.data.check.report import DataReport, ListSummary

__all__ = ["OFFICIAL_SETS", "DataReport", "ListSummary", "OfficialSet", "check_data", "where_text"]
