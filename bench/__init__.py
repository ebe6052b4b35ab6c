"""Measurements, and the pages that they (and the swap lab) work on."""
