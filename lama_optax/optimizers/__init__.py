"""Uses curvature to train: the documents' equations, and the optimizers made of them."""
