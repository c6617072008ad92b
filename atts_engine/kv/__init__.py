"""Paged KV bookkeeping: which pages a sequence holds, who shares them, what must be copied before a write."""

from atts_engine.kv.pages import OutOfPages, PagePool
from atts_engine.kv.table import BlockTable

__all__ = ["BlockTable", "OutOfPages", "PagePool"]
