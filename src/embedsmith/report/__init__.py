"""Reports: one HTML file that opens without a network, of a run, a merge or a comparison."""

from embedsmith.report.comparison import comparison_page, geometry_page
from embedsmith.report.facts import run_facts
from embedsmith.report.run_folder import folder_page, write_report

__all__ = ["comparison_page", "folder_page", "geometry_page", "run_facts", "write_report"]
