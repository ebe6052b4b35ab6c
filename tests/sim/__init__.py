"""Deterministic simulation: the owner's real code on a simulated clock, network and donors."""
