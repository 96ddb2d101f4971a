"""The table of workloads."""

import functools
import importlib.util
from collections.abc import Sequence

from benchmarks.study._control import control_workload
from benchmarks.study._language import language_workload
from benchmarks.study._physics import pinn_workload
from benchmarks.study._settings import WORKLOADS
from benchmarks.study._tables import table_workloads
from benchmarks.study._workload import Workload


@functools.cache
def all_workloads() -> dict[str, Workload]:
    """Every workload by its name, in the order of the tables."""
    built = [*table_workloads(), language_workload(), pinn_workload(), control_workload()]
    by_name = {workload.name: workload for workload in built}
    assert set(by_name) == set(WORKLOADS), "_settings.WORKLOADS names what is built here"
    return {name: by_name[name] for name in WORKLOADS}


def missing_packages(workload: Workload) -> Sequence[str]:
    """The packages that a workload needs and that are not installed."""
    return [name for name in workload.needs if importlib.util.find_spec(name) is None]
