"""Measures the curvature of every layer: one file an estimator, one protocol, one tracker."""
