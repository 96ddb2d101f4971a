"""Follows perturbed weights forwards to the products that use them."""
