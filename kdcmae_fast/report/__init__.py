"""A page on runs and their evaluations that a browser opens from the file system."""

from kdcmae_fast.report.page import write_report

__all__ = ["write_report"]
