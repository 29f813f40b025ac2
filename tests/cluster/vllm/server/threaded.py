"""A module that starts a thread when it is imported."""

from __future__ import annotations

import os
import threading

threading.Thread(
    target=threading.Event().wait, name="eternal", daemon=os.environ.get("THREADED_DAEMON") != "no"
).start()
