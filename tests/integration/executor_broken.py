"""Modules may do anything when they are imported; this one ends the process."""

import ctypes

ctypes.string_at(0)
