"""Adopting a predecessor's frames; its face is C only (adoption.pxd)."""
