"""The help of our commands: each default is said once, in the option's own text or behind it."""

from __future__ import annotations

import argparse


class EachDefaultOnce(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of an option that has one and whose text does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        none = action.default is None or action.default is False or action.default == []
        return text if none or "default" in text else super()._get_help_string(action)
