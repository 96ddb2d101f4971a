"""Uses curvature to train: the papers' equations, and the optimizers made of them."""
