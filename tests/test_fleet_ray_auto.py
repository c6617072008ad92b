"""Which cluster `--ray auto` joins. Without a cluster of this process: where there are two, Ray takes neither."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'atts-engine[ray]'")

pytestmark = pytest.mark.long  # starts Ray


def test_auto_does_not_join_the_local_cluster_of_another_command() -> None:
    hold = (
        "import sys; from atts_engine.evaluation.fleet import on_ray\n"
        "with on_ray.cluster('local'): print('up', flush=True); sys.stdin.read()"
    )
    join = (
        "from atts_engine.errors import InputError; from atts_engine.evaluation.fleet import on_ray\n"
        "try:\n    with on_ray.cluster('auto'): print('joined')\nexcept InputError as error: print(error)"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        told = subprocess.run([sys.executable, "-c", join], capture_output=True, text=True, check=True).stdout
        holder.stdin.close()
    assert "belongs to another command's --ray local" in told and "ray start --head" in told
