"""Interprets jaxprs. No other room meets the parts of JAX that are not stable."""
