"""Atomic files and folders, and the user's cache folder."""
