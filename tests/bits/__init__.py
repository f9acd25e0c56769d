"""Checks that a portable training has the same bits on other CPUs (`make check-bits`)."""
