"""Tables of launch settings that were measured on a device: found, checked, put in force.

A table is a JSON file named by its device, such as nvidia_h100_80gb_hbm3.json, in this folder, in the user's
(~/.cache/atts/tuning), or named by `--tuning FILE`; `atts bench --tune` writes it. A device without one runs the
kernels' defaults. docs/kernels.md shows the format.
"""

from __future__ import annotations

from atts_engine.ops.tuning.table import Entry, Table, file_name, find, in_force, load, merged, put_in_force, save

__all__ = ["Entry", "Table", "file_name", "find", "in_force", "load", "merged", "put_in_force", "save"]
