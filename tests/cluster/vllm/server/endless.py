"""A module whose import takes longer than anybody waits."""

from __future__ import annotations

import threading

threading.Event().wait()
