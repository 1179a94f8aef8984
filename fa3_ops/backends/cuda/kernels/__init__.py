"""Kernels in Gluon, for Hopper alone."""
