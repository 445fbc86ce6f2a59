"""Modules may do anything when they are imported; this one never comes back."""

import time

time.sleep(3600)
