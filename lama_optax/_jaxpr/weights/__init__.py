"""Follows weights forwards to the products that use them: flipout's signs, gauss_newton's taps."""
