"""Cores and quotas, read from trees like those of Linux."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixtral.ops.cores import usable_cores

V2 = "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "\n".join(
    [
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct",
        "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
        "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
    ]
)
DISK = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def machine(root: Path, siblings: list[str], *, name: str = "thread_siblings_list") -> None:
    """CPU number i has the siblings ``siblings[i]``."""
    write(root, {f"sys/devices/system/cpu/cpu{i}/topology/{name}": told for i, told in enumerate(siblings)})


def groups(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> None:
    write(root, {"proc/self/cgroup": cgroup, "proc/self/mountinfo": f"{DISK}\n{mounts}"})
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


HYPERTHREADS = ["0,4", "1,5", "2,6", "3,7"] * 2


@pytest.mark.parametrize("name", ["thread_siblings_list", "core_cpus_list"])
@pytest.mark.parametrize(
    ("allowed", "expected"), [(range(8), 4), ({0, 4}, 1), ({0, 1, 5}, 2), ({7}, 1), (range(4), 4), (set(), 1)]
)
def test_threads_of_a_core_count_once(tmp_path: Path, name: str, allowed: set[int], expected: int) -> None:
    machine(tmp_path, HYPERTHREADS, name=name)
    assert usable_cores(tmp_path, allowed) == expected


def test_where_nothing_is_told_every_cpu_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, range(6)) == 6
    write(
        tmp_path, {"proc/self/cgroup": "", "proc/self/mountinfo": "nonsense", "sys/fs/cgroup/cpu.max": "100000 100000"}
    )
    assert usable_cores(tmp_path, range(6)) == 6


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("max 100000", 8),
        ("300000 100000", 3),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("150000 50000", 3),
        ("300000 0", 8),
        ("300000", 8),
        ("", 8),
    ],
)
def test_a_quota_of_version_two(tmp_path: Path, told: str, expected: int) -> None:
    groups(tmp_path, "0::/", V2, {"cpu.max": told})
    assert usable_cores(tmp_path, range(8)) == expected


def test_groups_above_limit_too(tmp_path: Path) -> None:
    files = {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "500000 100000"}
    groups(tmp_path, "0::/a/b/c", V2, files)
    assert usable_cores(tmp_path, range(8)) == 2
    write(tmp_path, {"proc/self/cgroup": "0::/a/b"})
    assert usable_cores(tmp_path, range(8)) == 2
    write(tmp_path, {"proc/self/cgroup": "0::/other"})  # a group whose folder is not there
    assert usable_cores(tmp_path, range(8)) == 8


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3), ("20000", 1)])
def test_a_quota_of_version_one(tmp_path: Path, quota: str, expected: int) -> None:
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
    at = {f"cpu,cpuacct/docker/1/{name}": text for name, text in files.items()}
    groups(tmp_path, "9:memory:/docker/1\n4:cpuset:/\n2:cpu,cpuacct:/docker/1\n0::/docker/1", V1, at)
    assert usable_cores(tmp_path, range(8)) == expected


def test_both_versions_at_once(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "400000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "unified/cpu.max": "300000 100000",
    }
    mounts = V1 + "\n" + V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    groups(tmp_path, "2:cpu,cpuacct:/\n0::/", mounts, files)
    assert usable_cores(tmp_path, range(8)) == 3


@pytest.mark.parametrize("group", ["/docker/1", "/docker/1/..", "/../../x", "/"])
def test_a_container_sees_its_own_group_only(tmp_path: Path, group: str) -> None:
    """What is mounted is the group itself; its path is one of the machine outside, or hidden."""
    mounts = V2.replace("0:26 / ", "0:26 /docker/1 ")
    groups(tmp_path, f"0::{group}", mounts, {"cpu.max": "200000 100000", "docker/1/cpu.max": "100000 100000"})
    assert usable_cores(tmp_path, range(8)) == 2


def test_a_folder_with_a_space(tmp_path: Path) -> None:
    mounts = V2.replace("/sys/fs/cgroup ", r"/sys/fs/cgroup/with\040space ")
    groups(tmp_path, "0::/", mounts, {"with space/cpu.max": "200000 100000"})
    assert usable_cores(tmp_path, range(8)) == 2


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process may use one CPU only")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
