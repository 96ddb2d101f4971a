"""Copies notebook 05's first picture to where README shows it."""

import base64
import json
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Writes docs/images/fewer_bits.png."""
    notebook = json.loads((HERE / "05_fewer_bits.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    pictures = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    (HERE.parent / "images" / "fewer_bits.png").write_bytes(base64.b64decode(pictures[0]))


if __name__ == "__main__":
    main()
