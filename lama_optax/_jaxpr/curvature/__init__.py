"""Second derivatives of one function along several directions."""
