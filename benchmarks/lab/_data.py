"""The data of the four models: real where it can be, and nothing is downloaded."""

import hashlib
import importlib

import numpy as np
from sklearn.datasets import load_digits, make_moons
from sklearn.preprocessing import StandardScaler

#: SHA-256 of the text by the Python version that ships it: the topics change between versions.
KNOWN_TEXTS = {
    "37d06970fc926e60c16dff401e441b84752446a36b6b64516c229fdec77e992c": "3.11.7",
    "a68b7f5ba5e4f20a336cdc120f82b2921abdbdf57087aa6603ec52f342ce5a1c": "3.13.0",
}
#: Printable ASCII and the line's end have a token each; all else shares token 0.
NUM_TOKENS = 97

Examples = tuple[np.ndarray, ...]


def moons(seed: int) -> Examples:
    """The paper's data: 1000 points of the two moons, standardised, and their class."""
    x, y = make_moons(1000, noise=0.2, random_state=seed)
    return StandardScaler().fit_transform(x).astype(np.float32), y.astype(np.float32)


def digits(side: int) -> Examples:
    """scikit-learn's 1797 digits, 8x8 pixels in [0, 1], and their class.

    A larger ``side`` interpolates them bilinearly: the pictures get larger, not richer.
    """
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    if side != 8:
        at = np.clip((np.arange(side, dtype=np.float32) + 0.5) * 8 / side - 0.5, 0, 7)
        weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8, dtype=np.float32)))
        images = np.einsum("ai,bj,nijc->nabc", weights, weights, images, optimize=True)
    return images, labels.astype(np.int32)


def text() -> tuple[str, str]:
    """The topics of Python's own help, in alphabetical order, and the SHA-256 of that text."""
    # Typeshed does not know the module.
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    joined = "".join(topics[name] for name in sorted(topics))
    return joined, hashlib.sha256(joined.encode()).hexdigest()


def characters(length: int) -> Examples:
    """The text cut into sequences of ``length`` tokens and the one that follows."""
    codes = np.frombuffer(text()[0].encode("ascii", "replace"), np.uint8).astype(np.int32)
    tokens = np.where((codes >= 32) & (codes < 127), codes - 30, 0)
    tokens = np.where(codes == 10, 1, tokens)
    count = (len(tokens) - 1) // length
    starts = length * np.arange(count)[:, None]
    return (tokens[starts + np.arange(length + 1)],)
