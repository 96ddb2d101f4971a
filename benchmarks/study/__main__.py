"""The door of `python -m benchmarks.study`."""

import os
import sys
import time
from collections.abc import Sequence

from benchmarks.study._settings import PHASES, Settings, available_cores, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the phases asked for; returns the exit status that ``--help`` explains."""
    settings = parse(argv)
    try:
        return _run(settings)
    except KeyboardInterrupt:
        print(
            "\nInterrupted: what was finished is kept; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    except (LookupError, ValueError) as error:
        if isinstance(error, KeyError | IndexError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(settings: Settings) -> int:
    _use_all_cores()
    began = time.perf_counter()
    asked = PHASES if settings.phase == "all" else (settings.phase,)
    phases = [phase for phase in asked if phase != "report"]
    if phases:
        # Only now: jax reads the number of devices when it is first used.
        from benchmarks.study._run import run_phases

        run_phases(settings, phases)
    if "report" in asked:
        from benchmarks.study._report import main as report

        report(settings.results, settings.output)
    print(f"{time.perf_counter() - began:.0f} s; the results are in {settings.results}/.")
    return 0


def _use_all_cores() -> None:
    """Makes XLA show each core as a device, unless the user has said otherwise."""
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags and "jax" not in sys.modules:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={available_cores()}".strip()


if __name__ == "__main__":
    sys.exit(main())
