"""Pruning, whatever the model and its host.

Read `request` (what was asked), `select` (pictures in, kept rows out), `report`. `copies` says which rows are beam
copies, `saved` writes and reads attachments, `explain` draws what is kept, `pictures` loads a user's pictures.
"""

from .report import ImageReport, Report
from .request import Request, request_of
from .select import Kept, Picture, Selector, select

__all__ = ["ImageReport", "Kept", "Picture", "Report", "Request", "Selector", "request_of", "select"]
