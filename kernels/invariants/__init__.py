"""Rotation-invariant polynomials of one channel's tensors: the table, and its evaluation."""
