"""A sweep on a real Ray cluster of two nodes on this machine, one of which is taken away in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch

from analyses.sweep import cluster as sweep_ray
from analyses.sweep.local import Job
from hooks.errors import BadArgument
from interp.training import resume
from tests.interp.tiny import same

ROOT = Path(__file__).resolve().parents[3]
RECIPE = """
name: two
base:
  steps: {steps}
  batch_size: 4
  learning_rates: [1e-3]
  save_every: 20
  model_config: {{d_model: 8, n_layers: 1, d_state: 2}}
models: {{mamba: null, s4d: null}}
tasks: {{linreg: {{task_config: {{d: 2, n_pairs: 9}}}}}}
"""
pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head with one CPU, bound to the loopback device, without a dashboard and without reports."""
    for name, value in {**sweep_ray.SILENT, **sweep_ray.ONLY_HERE}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytest.importorskip("ray", reason="the extra `cluster` is not installed: pip install 'mambascope[cluster]'")
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # if Ray was imported before the lines above
    node = {"num_cpus": 1, "node_ip_address": sweep_ray.LOOPBACK, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    yield made
    made.shutdown()


def ray_listens() -> set[str]:
    """The addresses on which processes of Ray below this one listen."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray" in process.name() or "ray" in " ".join(process.cmdline()):
                found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


def sweep(recipe: Path, out: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "analyses.sweep", str(recipe), "--out", str(out), *argv]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def running(folder: Path) -> bool:
    """Whether a training holds ``folder``."""
    try:
        with resume.only_one(folder / "resume"):
            return False
    except BadArgument:
        return True


def test_a_lost_node_costs_no_cell_and_changes_no_weight(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1, node_ip_address=sweep_ray.LOOPBACK, include_dashboard=False)
    cluster.wait_for_nodes()
    recipe = tmp_path / "two.yaml"
    recipe.write_text(RECIPE.format(steps=1500))
    process = sweep(recipe, tmp_path / "ray", "--engine", "ray", "--address", cluster.address)
    cells = [tmp_path / "ray" / "sweep" / "two" / name for name in ("mamba-linreg", "s4d-linreg")]

    def wait_until(what: Any) -> None:
        until = time.monotonic() + 240
        while not what():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)

    # One CPU a node and one a cell: both train, so each is on a node of its own.
    wait_until(lambda: all((cell / "resume" / "state.safetensors").exists() for cell in cells))
    assert ray_listens() <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"} and ray_listens()
    assert all(running(cell) for cell in cells)
    cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: not all(running(cell) for cell in cells))
    (lost,) = (cell for cell in cells if not running(cell))
    assert not (lost / "model.safetensors").exists()
    assert 0 < resume.read(lost / "resume" / "state.safetensors").progress["step"] < 1500
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, (out, err)

    whole = sweep(recipe, tmp_path / "local", "--workers", "2")
    _, err = whole.communicate(timeout=500)
    assert whole.returncode == 0, err
    for cell in cells:
        other = tmp_path / "local" / "sweep" / "two" / cell.name / "model.safetensors"
        weights = safetensors.torch.load_file(cell / "model.safetensors")
        assert same(weights, safetensors.torch.load_file(other))
    tables = [next((tmp_path / engine / "sweep").glob("two-*/table.csv")) for engine in ("ray", "local")]
    assert tables[0].parent.name == tables[1].parent.name  # the same config, commit and weights
    one, two = (table.read_text().splitlines() for table in tables)
    columns = one[0].split(",")
    for left, right in zip(one, two, strict=True):
        cells_of = [dict(zip(columns, line.split(","), strict=True)) for line in (left, right)]
        assert all(cells_of[0][name] == cells_of[1][name] for name in columns if name != "seconds")


def test_a_failed_job_is_a_reason_and_a_cluster_that_is_not_there_a_refusal(cluster: Any, tmp_path: Path) -> None:
    said = "import sys; sys.exit('error: the reason')"
    jobs = [
        Job(name, ("-S", "-c", code), tmp_path / name, tmp_path / f"{name}.txt")
        for name, code in (("bad", said), ("good", "pass"))
    ]
    ticks: list[int] = []
    found = sweep_ray.run(jobs, 1, lambda: ticks.append(1), address=cluster.address)
    assert (found["bad"].reason, found["good"].ok, len(ticks)) == ("the reason", True, 2)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    with pytest.raises(BadArgument, match="no Ray cluster at"):
        sweep_ray.run(jobs, 1, address="127.0.0.1:1")
