"""Random programs, compared with their exact matrices: ``python -m tests.fuzz SEED``."""
